//! What a checkpoint has of a rank: its part of weights, averages and moments, copied out and read back.

use super::bucket::{Bucket, Buckets, Entry, slice};
use crate::ema::Average;
use crate::ffi::{SnapshotMemory, TensorTarget};
use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointReader, F32Bytes, Manifest, ReadInto, RunStore, Slice};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tch::{Device, Tensor};

/// This rank's shards in host memory that is made once and used for every checkpoint. A clone shares it with an upload.
#[derive(Clone)]
pub(super) struct Snapshot {
    memory: Arc<SnapshotMemory>,
    pieces: Arc<[Piece]>,
}

/// What this rank answers for of one section of one bucket.
struct Piece {
    bucket: usize,
    section: Section,
    /// From its first to its last entry, in what this rank holds: frozen parameters' moments are not copied.
    span: Range<usize>,
    /// Where the span starts in the memory.
    start: usize,
    entries: Vec<SnapshotEntry>,
}

struct SnapshotEntry {
    name: String,
    shape: Vec<usize>,
    start_numel: usize,
    range: Range<usize>,
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

    /// What this rank holds of it.
    fn of(&self, bucket: &Bucket) -> Tensor {
        match self.holds {
            Holds::Params => bucket.held.shallow_clone(),
            Holds::Average(index) => bucket.averages[index].shallow_clone(),
            Holds::ExpAvg => bucket.exp_avg.shallow_clone(),
            Holds::ExpAvgSq => bucket.exp_avg_sq.shallow_clone(),
        }
    }

    /// Its names, whoever owns them.
    fn names(&self, buckets: &Buckets) -> Vec<String> {
        let entries = buckets.0.iter().flat_map(|bucket| &bucket.layout.entries);
        entries.filter(|entry| self.has(entry)).map(|entry| format!("{}{}", self.prefix, entry.name)).collect()
    }

    /// Frozen parameters have no moments.
    fn has(&self, entry: &Entry) -> bool {
        entry.spec.trainable || matches!(self.holds, Holds::Params | Holds::Average(_))
    }

    /// The entries of a bucket that it has and that have elements in `part` of what this rank holds.
    fn entries(&self, bucket: &Bucket, part: &Range<usize>) -> Vec<SnapshotEntry> {
        let shard = &bucket.shard;
        let in_part = |entry: &Entry| {
            let (whole, first) = (entry.range(), entry.range().start.max(part.start));
            let end = whole.end.min(part.end);
            (first < end && self.has(entry)).then(|| SnapshotEntry {
                name: format!("{}{}", self.prefix, entry.name),
                shape: entry.spec.shape.iter().map(|&side| side as usize).collect(),
                start_numel: first - whole.start,
                range: first - shard.start..end - shard.start,
            })
        };
        bucket.layout.entries.iter().filter_map(in_part).collect()
    }
}

impl Snapshot {
    /// Room for what this rank answers for.
    pub(super) fn allocate(buckets: &Buckets, averages: &[Average]) -> Result<Self> {
        let mut numel = 0;
        let mut pieces = Vec::new();
        for (index, bucket) in buckets.0.iter().enumerate() {
            for section in Section::all(averages) {
                let entries = section.entries(bucket, &bucket.own);
                let (Some(first), Some(last)) = (entries.first(), entries.last()) else { continue };
                let span = first.range.start..last.range.end;
                let start = numel;
                numel += span.len();
                pieces.push(Piece { bucket: index, section, span, start, entries });
            }
        }
        let device = buckets.0.first().map_or(Device::Cpu, |bucket| bucket.held.device());
        let memory = SnapshotMemory::allocate(numel, device);
        let memory = memory.with_context(|| format!("{} MiB of host memory for checkpoints", numel >> 18))?;
        Ok(Self { memory: Arc::new(memory), pieces: pieces.into() })
    }

    /// Copies this rank's shards as they are now. An upload of the copy before must have ended; a store that has not let
    /// its memory go yet is waited for until `give_up`.
    pub(super) fn take(&mut self, buckets: &Buckets, give_up: Instant) -> Result<()> {
        let source = |piece: &Piece| slice(&piece.section.of(&buckets.0[piece.bucket]), &piece.span);
        let sources: Vec<Tensor> = self.pieces.iter().map(source).collect();
        loop {
            if let Some(memory) = Arc::get_mut(&mut self.memory) {
                return memory.fill(&sources).context("copying a shard for a checkpoint");
            }
            if Instant::now() > give_up {
                bail!("the store still holds the memory of the checkpoint before; is it hanging?");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Elements of the memory.
    #[cfg(test)]
    pub(super) fn numel(&self) -> usize {
        self.memory.as_ref().as_ref().len()
    }

    pub(super) fn slices(&self) -> Vec<Slice<'_>> {
        let mut slices = Vec::new();
        for piece in self.pieces.iter() {
            let in_memory = |at: usize| piece.start + at - piece.span.start;
            slices.extend(piece.entries.iter().map(|entry| Slice {
                name: &entry.name,
                shape: &entry.shape,
                start_numel: entry.start_numel,
                data: F32Bytes::shared(&self.memory, in_memory(entry.range.start)..in_memory(entry.range.end)),
            }));
        }
        slices
    }
}

/// Fills what this rank holds from a checkpoint of any world size and sharding, and verifies this rank's part (number, of how many) of
/// what no rank needs. The other ranks' weights are not read: gather them.
///
/// A checkpoint before the first update (imported weights) need not have averages, which are then copies of the weights,
/// nor moments, which are then zero.
///
/// # Errors
/// A damaged or missing object, or a tensor of another name or shape than the model's.
pub fn restore(
    store: &RunStore,
    manifest: &Manifest,
    buckets: &Buckets,
    averages: &[Average],
    part: (usize, usize),
) -> Result<()> {
    let reader = store.read(manifest);
    let is_there = |section: &Section| reader.names().any(|name| name.starts_with(&section.prefix));
    let (held, lacking): (Vec<Section>, Vec<Section>) = Section::all(averages)
        .into_iter()
        .partition(|section| manifest.optimizer_step > 0 || section.holds == Holds::Params || is_there(section));
    let needed: HashSet<String> = held.iter().flat_map(|section| section.names(buckets)).collect();
    let targets = |bucket| held.iter().map(move |section: &Section| (section, bucket)).collect::<Vec<_>>();
    match buckets.0.first().map(|bucket| bucket.held.device()) {
        // One pass over the store, straight to where the values belong.
        Some(Device::Cpu) => restore_all(&reader, &buckets.0.iter().flat_map(targets).collect::<Vec<_>>())?,
        // So much at a time as one bucket has, by way of host memory.
        _ => buckets.0.iter().try_for_each(|bucket| restore_all(&reader, &targets(bucket)))?,
    }
    for bucket in &buckets.0 {
        for section in &lacking {
            tch::no_grad(|| match section.holds {
                Holds::Params | Holds::Average(_) => section.of(bucket).copy_(&bucket.held),
                // A damaged checkpoint may have been tried before.
                Holds::ExpAvg | Holds::ExpAvgSq => drop(section.of(bucket).zero_()),
            });
        }
    }
    reader.verify_others(|name| needed.contains(name), part)?;
    Ok(())
}

/// Reads sections of buckets, together in one go.
fn restore_all(reader: &CheckpointReader, targets: &[(&Section, &Bucket)]) -> Result<()> {
    let on_host = |section: &Section, bucket: &Bucket| match section.of(bucket) {
        target if target.device() == Device::Cpu => target,
        target => Tensor::zeros_like(&target).to_device(Device::Cpu),
    };
    let owned: Vec<_> = targets.iter().map(|(section, bucket)| section.entries(bucket, &bucket.shard)).collect();
    let hosts: Vec<Tensor> = targets.iter().map(|(section, bucket)| on_host(section, bucket)).collect();
    let mut requests = Vec::new();
    for (host, entries) in hosts.iter().zip(&owned) {
        // Padding between entries stays zero.
        for entry in entries {
            let found = reader.shape(&entry.name);
            if found != Some(&entry.shape[..]) {
                let (step, name) = (reader.manifest().step, &entry.name);
                bail!("checkpoint of step {step}: `{name}` has shape {found:?}; expected {:?}", entry.shape);
            }
            let out = TensorTarget::new(host, entry.range.clone());
            requests.push(ReadInto { name: &entry.name, start_numel: entry.start_numel, out });
        }
    }
    reader.read_into(requests)?;
    for ((section, bucket), host) in targets.iter().zip(&hosts) {
        let mut target = section.of(bucket);
        if target.device() != Device::Cpu {
            tch::no_grad(|| target.copy_(host));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::mesh::Mesh;
    use crate::model::testing::tiny_dit;
    use checkpoint::{AttemptInfo, Commit, ShardId};
    use configs::Sharding;

    fn averages() -> Vec<Average> {
        Average::of_config(&configs::EmaConfig {
            decay: 0.9,
            further_decays: vec![0.5],
            warmup: false,
            power: vec![0.1],
        })
    }

    fn buckets(rank: usize, world_size: usize) -> Buckets {
        let mesh = Mesh::of(rank, world_size, 4, Sharding::Optimizer, None).unwrap();
        Buckets::initialise(&tiny_dit(), &mesh, averages().len(), 8, &Default::default(), Device::Cpu).unwrap()
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
            let mut snapshot = Snapshot::allocate(&buckets, &averages()).unwrap();
            snapshot.take(&buckets, Instant::now()).unwrap();
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
        let restored = Buckets::zeroed(&tiny_dit(), &Mesh::alone(4).unwrap(), 3, Device::Cpu).unwrap();
        restore(&store, &manifest, &restored, &averages(), (0, 1)).unwrap();
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
    fn the_same_memory_serves_every_checkpoint_once_its_upload_has_let_it_go() {
        let buckets = buckets(0, 1);
        let mut snapshot = Snapshot::allocate(&buckets, &averages()).unwrap();
        let place = snapshot.memory.as_ref().as_ref().as_ptr();
        snapshot.take(&buckets, Instant::now()).unwrap();
        let upload = snapshot.clone().slices().pop().map(|slice| slice.data);
        let held = snapshot.take(&buckets, Instant::now()).unwrap_err().to_string();
        assert!(held.contains("still holds the memory"), "{held}");
        drop(upload);
        snapshot.take(&buckets, Instant::now()).unwrap();
        assert_eq!(snapshot.memory.as_ref().as_ref().as_ptr(), place);
    }

    #[test]
    fn imported_weights_alone_are_a_start_and_later_nothing_may_be_missing() {
        let (store, manifest) = saved("weights-alone", 0, |name| name.starts_with("model/"));
        let restored = buckets(1, 4);
        for bucket in &restored.0 {
            bucket.averages.iter().for_each(|average| drop(average.shallow_clone().fill_(7.0)));
        }
        restore(&store, &manifest, &restored, &averages(), (0, 1)).unwrap();
        for bucket in &restored.0 {
            assert!(bucket.averages.iter().all(|average| average.equal(&bucket.held)));
            assert_eq!(bucket.exp_avg_sq.abs().max().double_value(&[]), 0.0);
        }
        for missing in ["ema_0.5/", "adamw/exp_avg_sq/"] {
            let (store, manifest) = saved(&missing.replace('/', "-"), 1, |name| !name.starts_with(missing));
            let error = restore(&store, &manifest, &buckets(0, 1), &averages(), (0, 1)).unwrap_err().to_string();
            assert!(error.contains("step 500") && error.contains(&format!("`{missing}")), "{error}");
        }
    }
}
