//! What a checkpoint holds of a rank: its shards of weights, averages and moments, copied out and read back.

use super::bucket::{Bucket, Buckets, Entry};
use crate::ema::Average;
use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointReader, F32Bytes, Manifest, ReadInto, RunStore, Slice};
use std::sync::Arc;
use tch::Tensor;

/// A copy of this rank's shards in host memory.
pub(super) struct Snapshot(Vec<Piece>);

/// The owned elements of one section of one bucket.
struct Piece {
    values: Arc<Vec<f32>>,
    entries: Vec<SnapshotEntry>,
}

struct SnapshotEntry {
    name: String,
    shape: Vec<usize>,
    start_numel: usize,
    range: std::ops::Range<usize>,
}

/// A section of a checkpoint.
struct Section {
    /// With the slash.
    prefix: String,
    /// Which tensor of a bucket it holds.
    holds: Holds,
}

#[derive(Clone, Copy, PartialEq)]
enum Holds {
    Params,
    Average(usize),
    ExpAvg,
    ExpAvgSq,
}

impl Section {
    /// The sections of a run with these averages. The weights come first.
    fn all(averages: &[Average]) -> Vec<Self> {
        let section = |prefix: &str, holds| Self { prefix: format!("{prefix}/"), holds };
        let average = |(index, average): (usize, &Average)| section(&average.section, Holds::Average(index));
        std::iter::once(section("model", Holds::Params))
            .chain(averages.iter().enumerate().map(average))
            .chain([section("adamw/exp_avg", Holds::ExpAvg), section("adamw/exp_avg_sq", Holds::ExpAvgSq)])
            .collect()
    }

    /// This rank's shard of it.
    fn of(&self, bucket: &Bucket) -> Tensor {
        match self.holds {
            Holds::Params => bucket.params_shard(),
            Holds::Average(index) => bucket.averages[index].shallow_clone(),
            Holds::ExpAvg => bucket.exp_avg.shallow_clone(),
            Holds::ExpAvgSq => bucket.exp_avg_sq.shallow_clone(),
        }
    }

    /// The entries of a bucket that it has and this rank owns elements of. Frozen parameters have no moments.
    fn owned_entries(&self, bucket: &Bucket) -> Vec<SnapshotEntry> {
        let shard = &bucket.shard;
        let with_frozen = matches!(self.holds, Holds::Params | Holds::Average(_));
        let owned = |entry: &Entry| {
            let (whole, first) = (entry.range(), entry.range().start.max(shard.start));
            let end = whole.end.min(shard.end);
            (first < end && (entry.spec.trainable || with_frozen)).then(|| SnapshotEntry {
                name: format!("{}{}", self.prefix, entry.name),
                shape: entry.spec.shape.iter().map(|&side| side as usize).collect(),
                start_numel: first - whole.start,
                range: first - shard.start..end - shard.start,
            })
        };
        bucket.layout.entries.iter().filter_map(owned).collect()
    }
}

impl Snapshot {
    pub(super) fn of(buckets: &Buckets, averages: &[Average]) -> Result<Self> {
        let sections = Section::all(averages);
        let mut pieces = Vec::with_capacity(buckets.0.len() * sections.len());
        for bucket in &buckets.0 {
            for section in &sections {
                let values = Vec::<f32>::try_from(section.of(bucket)).context("copying a shard for a checkpoint")?;
                pieces.push(Piece { values: Arc::new(values), entries: section.owned_entries(bucket) });
            }
        }
        Ok(Self(pieces))
    }

    pub(super) fn slices(&self) -> Vec<Slice<'_>> {
        let mut slices = Vec::new();
        for piece in &self.0 {
            slices.extend(piece.entries.iter().map(|entry| Slice {
                name: &entry.name,
                shape: &entry.shape,
                start_numel: entry.start_numel,
                data: F32Bytes::shared(&piece.values, entry.range.clone()),
            }));
        }
        slices
    }
}

/// Fills this rank's shards from a checkpoint of any world size. The other ranks' weights are not read: gather them.
///
/// A checkpoint before the first update (imported weights) need not have averages, which are then copies of the weights,
/// nor moments, which are then zero.
///
/// # Errors
/// A damaged or missing object, or a tensor of another name or shape than the model's.
pub fn restore(store: &RunStore, manifest: &Manifest, buckets: &Buckets, averages: &[Average]) -> Result<()> {
    let reader = store.read(manifest);
    for section in Section::all(averages) {
        let has_it = reader.names().any(|name| name.starts_with(&section.prefix));
        for bucket in &buckets.0 {
            match section.holds {
                Holds::Params => {
                    restore_section(&reader, &section, bucket)?;
                    bucket.copy_to_averages();
                }
                Holds::Average(_) | Holds::ExpAvg | Holds::ExpAvgSq if manifest.optimizer_step == 0 && !has_it => {}
                _ => restore_section(&reader, &section, bucket)?,
            }
        }
    }
    Ok(())
}

fn restore_section(reader: &CheckpointReader, section: &Section, bucket: &Bucket) -> Result<()> {
    let mut values = vec![0f32; bucket.shard.len()];
    let entries = section.owned_entries(bucket);
    let mut requests = Vec::with_capacity(entries.len());
    // Entries ascend, so the shard can be cut into one output an entry; padding in between stays zero.
    let (mut rest, mut position) = (&mut values[..], 0);
    for entry in &entries {
        let found = reader.shape(&entry.name);
        if found != Some(&entry.shape[..]) {
            let (step, name) = (reader.manifest().step, &entry.name);
            bail!("checkpoint of step {step}: `{name}` has shape {found:?}; expected {:?}", entry.shape);
        }
        let (_, from_entry) = rest.split_at_mut(entry.range.start - position);
        let (out, after) = from_entry.split_at_mut(entry.range.len());
        requests.push(ReadInto { name: &entry.name, start_numel: entry.start_numel, out });
        (rest, position) = (after, entry.range.end);
    }
    reader.read_into(&mut requests)?;
    tch::no_grad(|| section.of(bucket).copy_(&Tensor::from_slice(&values)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;
    use checkpoint::{AttemptInfo, Commit, ShardId};
    use configs::lanes::LaneBlock;
    use tch::Device;

    fn averages() -> Vec<Average> {
        Average::of_config(&configs::EmaConfig {
            decay: 0.9,
            further_decays: vec![0.5],
            warmup: false,
            power: vec![0.1],
        })
    }

    fn buckets(rank: usize, world_size: usize) -> Buckets {
        let block = LaneBlock::of(rank, world_size, 4).unwrap();
        Buckets::initialise(&tiny_dit(), 4, block, averages().len(), 8, &Default::default(), Device::Cpu)
    }

    /// A checkpoint by two ranks of some of these buckets' sections.
    fn saved(name: &str, optimizer_step: u64, keep: impl Fn(&str) -> bool) -> (RunStore, Manifest) {
        let store = RunStore::open(&format!("memory:///{name}")).unwrap();
        let attempt = store.claim_attempt(&AttemptInfo { world_size: 2, ..Default::default() }).unwrap();
        let write = |rank| {
            let buckets = buckets(rank, 2);
            for (number, bucket) in buckets.0.iter().enumerate() {
                let owned = bucket.averages.iter().chain([&bucket.exp_avg, &bucket.exp_avg_sq]);
                owned.enumerate().for_each(|(index, tensor)| {
                    let _ = tensor.shallow_clone().fill_((number * 10 + index + 1) as f64);
                });
            }
            let snapshot = Snapshot::of(&buckets, &averages()).unwrap();
            let slices: Vec<Slice> = snapshot.slices().into_iter().filter(|slice| keep(slice.name)).collect();
            store.write_shard(&ShardId { attempt, step: 500, rank, world_size: 2 }, &slices).unwrap()
        };
        let commit =
            Commit { attempt, step: 500, optimizer_step, shards: (0..2).map(write).collect(), ..Default::default() };
        let manifest = store.commit(commit).unwrap();
        (store, manifest)
    }

    #[test]
    fn every_average_and_moment_comes_back_to_its_own_place_on_another_number_of_ranks() {
        let (store, manifest) = saved("all-sections", 500, |_| true);
        assert!(
            manifest.tensors.contains_key("ema_0.5/pos_embed")
                && manifest.tensors.contains_key("ema_power_0.1/pos_embed")
        );
        assert!(!manifest.tensors.contains_key("adamw/exp_avg/pos_embed"));
        let fresh = buckets(0, 1);
        let restored = Buckets::zeroed(&tiny_dit(), 4, LaneBlock::of(0, 1, 4).unwrap(), 3, Device::Cpu);
        restore(&store, &manifest, &restored, &averages()).unwrap();
        for (number, (bucket, fresh)) in restored.0.iter().zip(&fresh.0).enumerate() {
            assert!(bucket.params.equal(&fresh.params));
            let states = bucket.averages.iter().chain([&bucket.exp_avg, &bucket.exp_avg_sq]);
            for (index, state) in states.enumerate() {
                // Padding is not stored, the parameters are.
                let highest = state.max().double_value(&[]);
                assert_eq!(highest, (number * 10 + index + 1) as f64, "bucket {number}, state {index}");
            }
        }
    }

    #[test]
    fn imported_weights_alone_are_a_start_and_later_nothing_may_be_missing() {
        let (store, manifest) = saved("weights-alone", 0, |name| name.starts_with("model/"));
        let restored = buckets(1, 4);
        for bucket in &restored.0 {
            bucket.averages.iter().for_each(|average| drop(average.shallow_clone().fill_(7.0)));
        }
        restore(&store, &manifest, &restored, &averages()).unwrap();
        for bucket in &restored.0 {
            assert!(bucket.averages.iter().all(|average| average.equal(&bucket.params_shard())));
            assert_eq!(bucket.exp_avg_sq.abs().max().double_value(&[]), 0.0);
        }
        for missing in ["ema_0.5/", "adamw/exp_avg_sq/"] {
            let (store, manifest) = saved(&missing.replace('/', "-"), 1, |name| !name.starts_with(missing));
            let error = restore(&store, &manifest, &buckets(0, 1), &averages()).unwrap_err().to_string();
            assert!(error.contains("step 500") && error.contains(&format!("`{missing}")), "{error}");
        }
    }
}
