//! Flat buffers: one bucket a segment, cut into shards that do not depend on who owns them.

use super::mesh::Mesh;
use crate::ffi::{self, TorchError};
use crate::model::{Init, Model, ParamSpec, Segment, Weights, initial_values};
use configs::lanes::LaneBlock;
use std::collections::HashMap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// Every tensor starts at a multiple of this many elements (64 bytes of float32).
const ALIGN_NUMEL: usize = 16;
/// A bucket is padded to lanes × this many elements.
const FINEST_ALIGN_NUMEL: usize = 64;

/// Where one parameter lies in its bucket.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Full name, as in the official state dict.
    pub name: String,
    /// Its declaration.
    pub spec: ParamSpec,
    /// First element in the bucket.
    pub offset: usize,
}

impl Entry {
    /// Its elements of the bucket.
    pub fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.spec.numel()
    }
}

/// The layout of a bucket: a pure function of the segment and the number of lanes.
#[derive(Clone, Debug)]
pub struct BucketLayout {
    /// Trainable parameters first, then frozen ones.
    pub entries: Vec<Entry>,
    /// Elements with padding; a multiple of lanes × 64.
    pub numel: usize,
    /// Elements of a finest shard: numel / lanes. Every sum that must not depend on the world size is made per finest
    /// shard and then along the lane tree.
    pub finest_numel: usize,
}

impl BucketLayout {
    /// Lays out the parameters of `segment`.
    pub fn new(segment: &dyn Segment, lanes: usize) -> Self {
        let (trainable, frozen): (Vec<_>, Vec<_>) = segment.params().into_iter().partition(|spec| spec.trainable);
        let mut end: usize = 0;
        let place = |spec: ParamSpec| {
            let offset = end;
            end = (offset + spec.numel()).next_multiple_of(ALIGN_NUMEL);
            Entry { name: format!("{}{}", segment.prefix(), spec.name), spec, offset }
        };
        let entries: Vec<Entry> = trainable.into_iter().chain(frozen).map(place).collect();
        let numel = end.next_multiple_of(lanes * FINEST_ALIGN_NUMEL);
        Self { entries, numel, finest_numel: numel / lanes }
    }

    /// The elements of a block of finest shards.
    pub fn shard(&self, block: LaneBlock) -> Range<usize> {
        block.first * self.finest_numel..(block.first + block.len) * self.finest_numel
    }

    /// The spans that the optimizer treats as one, with their group: each finest shard of `shard`, cut where the group
    /// of the parameters (`group_of`) changes and where frozen ones begin. They are the same for every world size, and so
    /// is the arithmetic on them.
    pub fn trainable_spans(
        &self,
        shard: Range<usize>,
        group_of: impl Fn(&Entry) -> usize,
    ) -> Vec<(usize, Range<usize>)> {
        let mut runs: Vec<(usize, Range<usize>)> = Vec::new();
        for entry in self.entries.iter().filter(|entry| entry.spec.trainable) {
            let group = group_of(entry);
            if runs.last().is_none_or(|(last, _)| *last != group) {
                runs.push((group, entry.offset..entry.offset));
            }
            // With its padding, which stays zero whatever the group.
            if let Some((_, run)) = runs.last_mut() {
                run.end = entry.range().end.next_multiple_of(ALIGN_NUMEL);
            }
        }
        let cut = |finest: Range<usize>| {
            let overlap = move |(group, run): &(usize, Range<usize>)| {
                (*group, run.start.max(finest.start)..run.end.min(finest.end))
            };
            runs.iter().map(overlap).filter(|(_, span)| span.start < span.end)
        };
        shard.step_by(self.finest_numel).flat_map(|start| cut(start..start + self.finest_numel)).collect()
    }
}

/// The weights of one segment on this rank, with this rank's shard of everything that goes with them.
pub struct Bucket {
    /// Where things lie.
    pub layout: BucketLayout,
    /// The elements that this rank holds the state of.
    pub shard: Range<usize>,
    /// Those of them that it answers for.
    pub own: Range<usize>,
    /// All weights, `[numel]` float32. Where weights are shared out there is memory behind them only between
    /// `make_room` and `free_room`.
    pub params: Tensor,
    /// The weights of the held elements, `[shard]`: a view of `params`, or memory of their own where weights are shared out.
    pub held: Tensor,
    /// Of the held elements: AdamW's first moment, `[shard]`.
    pub exp_avg: Tensor,
    /// AdamW's second moment, `[shard]`.
    pub exp_avg_sq: Tensor,
    /// The moving averages of the weights, each `[shard]`; the main one first.
    pub averages: Vec<Tensor>,
    /// Views of `params` by name, leaves of the autograd graph.
    pub weights: Weights,
    /// The trainable views, in layout order.
    pub trainable: Vec<Tensor>,
}

impl Bucket {
    fn new(segment: &dyn Segment, mesh: &Mesh, averages: usize, device: Device) -> Self {
        let layout = BucketLayout::new(segment, mesh.lanes);
        let (shard, own) = (layout.shard(mesh.held()), layout.shard(mesh.own()));
        let zeros = |numel: usize| Tensor::zeros([numel as i64], (Kind::Float, device));
        let params = zeros(layout.numel);
        let view = |entry: &Entry| view_of(&params, entry).set_requires_grad(entry.spec.trainable);
        let views: Vec<Tensor> = layout.entries.iter().map(view).collect();
        let local_name = |entry: &Entry| entry.name[segment.prefix().len()..].to_owned();
        let trainable = |(entry, view): (&Entry, &Tensor)| entry.spec.trainable.then(|| view.shallow_clone());
        Self {
            trainable: layout.entries.iter().zip(&views).filter_map(trainable).collect(),
            weights: Weights::new(layout.entries.iter().map(local_name).zip(views)),
            exp_avg: zeros(shard.len()),
            exp_avg_sq: zeros(shard.len()),
            averages: (0..averages).map(|_| zeros(shard.len())).collect(),
            held: if mesh.shares_out_weights() { zeros(shard.len()) } else { slice(&params, &shard) },
            params,
            shard,
            own,
            layout,
        }
    }

    /// Starts every average as a copy of the weights.
    pub fn copy_to_averages(&self) {
        tch::no_grad(|| self.averages.iter().for_each(|average| average.shallow_clone().copy_(&self.held)));
    }

    /// Gives `params` memory, whose values are undefined.
    ///
    /// # Errors
    /// No memory.
    pub(super) fn make_room(&self) -> Result<(), TorchError> {
        ffi::allocate_storage(&self.params)
    }

    /// Takes the memory of `params` away. Graphs that refer to it need it again before they are run backwards.
    ///
    /// # Errors
    /// What libtorch reports.
    pub(super) fn free_room(&self) -> Result<(), TorchError> {
        ffi::free_storage(&self.params)
    }
}

/// `range` of a flat tensor, a view.
pub fn slice(flat: &Tensor, range: &Range<usize>) -> Tensor {
    flat.narrow(0, range.start as i64, range.len() as i64)
}

/// A parameter in a flat tensor of its bucket's layout, a view in the parameter's shape.
pub fn view_of(flat: &Tensor, entry: &Entry) -> Tensor {
    slice(flat, &entry.range()).view(entry.spec.shape.as_slice()).detach()
}

/// All buckets of a model on this rank, in segment order.
pub struct Buckets(pub Vec<Bucket>);

impl Buckets {
    /// The `given` weights, by full name and in the parameter's shape, and freshly initialised ones for the rest; the
    /// averages are copies of them (DiT), the moments are zero.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn initialise(
        model: &dyn Model,
        mesh: &Mesh,
        averages: usize,
        seed: u64,
        given: &HashMap<String, Tensor>,
        device: Device,
    ) -> Result<Self, TorchError> {
        let bucket = |segment: &dyn Segment| {
            let bucket = Bucket::new(segment, mesh, averages, device);
            tch::no_grad(|| {
                for entry in &bucket.layout.entries {
                    let mut target = slice(&bucket.params, &entry.range());
                    if let Some(given) = given.get(&entry.name) {
                        target.copy_(&given.reshape([-1]));
                    } else if entry.spec.init != Init::Zeros {
                        let values = initial_values(seed, &entry.name, &entry.spec.init, entry.spec.numel());
                        target.copy_(&Tensor::from_slice(&values));
                    }
                }
                if mesh.shares_out_weights() {
                    bucket.held.shallow_clone().copy_(&slice(&bucket.params, &bucket.shard));
                    bucket.free_room()?;
                }
                bucket.copy_to_averages();
                Ok(bucket)
            })
        };
        model.segments().iter().map(|segment| bucket(&**segment)).collect::<Result<_, _>>().map(Self)
    }

    /// Everything zero, with room for that many averages, to be filled from a checkpoint.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn zeroed(model: &dyn Model, mesh: &Mesh, averages: usize, device: Device) -> Result<Self, TorchError> {
        let bucket = |segment: &dyn Segment| {
            let bucket = Bucket::new(segment, mesh, averages, device);
            if mesh.shares_out_weights() {
                bucket.free_room()?;
            }
            Ok(bucket)
        };
        model.segments().iter().map(|segment| bucket(&**segment)).collect::<Result<_, _>>().map(Self)
    }

    /// Elements of all buckets, padding included.
    pub fn numel(&self) -> usize {
        self.0.iter().map(|bucket| bucket.layout.numel).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Model;
    use crate::model::testing::tiny_dit;

    #[test]
    fn layouts_are_aligned_and_spans_cover_every_element_once_for_every_world_size_and_grouping() {
        let groupings: [fn(&Entry) -> usize; 2] = [|_| 0, |entry| entry.name.ends_with(".bias").into()];
        let model = tiny_dit();
        for lanes in [1, 2, 8] {
            for segment in model.segments() {
                let layout = BucketLayout::new(&**segment, lanes);
                assert_eq!(layout.numel % (lanes * 64), 0);
                assert!(layout.entries.windows(2).all(|w| w[0].range().end <= w[1].offset));
                assert!(layout.entries.iter().all(|e| e.offset % 16 == 0 && e.range().end <= layout.numel));
                for group_of in groupings {
                    let all_spans = layout.trainable_spans(0..layout.numel, group_of);
                    let covered: usize = all_spans.iter().map(|(_, span)| span.len()).sum();
                    let trainable = layout.entries.iter().filter(|entry| entry.spec.trainable);
                    let padded = trainable.map(|entry| entry.spec.numel().next_multiple_of(16));
                    assert_eq!(covered, padded.sum::<usize>());
                    for (group, span) in &all_spans {
                        let touched =
                            layout.entries.iter().filter(|e| e.offset < span.end && e.range().end > span.start);
                        assert!(touched.into_iter().all(|entry| group_of(entry) == *group), "{span:?}");
                        assert!(span.start % 16 == 0 && span.len() <= layout.finest_numel);
                    }
                    for world_size in configs::lanes::allowed_world_sizes(lanes) {
                        let block = |rank| LaneBlock::of(rank, world_size, lanes).unwrap();
                        let shards: Vec<_> = (0..world_size).map(|rank| layout.shard(block(rank))).collect();
                        assert_eq!((shards[0].start, shards[world_size - 1].end), (0, layout.numel));
                        assert!(shards.windows(2).all(|w| w[0].end == w[1].start));
                        let spans = shards.into_iter().flat_map(|shard| layout.trainable_spans(shard, group_of));
                        assert_eq!(spans.collect::<Vec<_>>(), all_spans, "{lanes} lanes on {world_size} ranks");
                    }
                }
            }
        }
    }
}
