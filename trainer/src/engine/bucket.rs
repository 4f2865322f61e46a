//! Flat buffers: one bucket a segment, cut into shards that do not depend on who owns them.

use crate::model::{Init, Model, ParamSpec, Segment, Weights, initial_values};
use configs::lanes::LaneBlock;
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
    /// The trainable ones lie below this element; a multiple of 16.
    pub trainable_numel: usize,
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
        let mut next = 0;
        let mut place = |specs: Vec<ParamSpec>| {
            let place_one = |spec: ParamSpec| {
                let offset = next;
                next = (offset + spec.numel()).next_multiple_of(ALIGN_NUMEL);
                Entry { name: format!("{}{}", segment.prefix(), spec.name), spec, offset }
            };
            let entries: Vec<Entry> = specs.into_iter().map(place_one).collect();
            (entries, next)
        };
        let (mut entries, trainable_numel) = place(trainable);
        let (frozen, end) = place(frozen);
        entries.extend(frozen);
        let numel = end.next_multiple_of(lanes * FINEST_ALIGN_NUMEL);
        Self { entries, trainable_numel, numel, finest_numel: numel / lanes }
    }

    /// The elements that the owner of a block of lanes owns.
    pub fn shard(&self, block: LaneBlock) -> Range<usize> {
        block.first * self.finest_numel..(block.first + block.len) * self.finest_numel
    }

    /// The spans that the optimizer treats as one: each finest shard, cut where frozen parameters begin. They are the
    /// same for every world size, and so is the arithmetic on them.
    pub fn trainable_spans(&self, shard: Range<usize>) -> impl Iterator<Item = Range<usize>> + '_ {
        let end = shard.end.min(self.trainable_numel);
        let finest = self.finest_numel;
        shard.step_by(finest).map(move |start| start..(start + finest).min(end)).filter(|span| span.start < span.end)
    }
}

/// The weights of one segment on this rank, with this rank's shard of everything that goes with them.
pub struct Bucket {
    /// Where things lie.
    pub layout: BucketLayout,
    /// The elements that this rank owns.
    pub shard: Range<usize>,
    /// All weights, [numel] float32.
    pub params: Tensor,
    /// Of the owned elements: AdamW's first moment, [shard].
    pub exp_avg: Tensor,
    /// AdamW's second moment, [shard].
    pub exp_avg_sq: Tensor,
    /// Exponential moving average of the weights, [shard].
    pub ema: Tensor,
    /// Views of `params` by name, leaves of the autograd graph.
    pub weights: Weights,
    /// The trainable views, in layout order.
    pub trainable: Vec<Tensor>,
}

impl Bucket {
    fn new(segment: &dyn Segment, layout: BucketLayout, shard: Range<usize>, device: Device) -> Self {
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
            ema: zeros(shard.len()),
            params,
            shard,
            layout,
        }
    }

    /// This rank's shard of the weights, a view.
    pub fn params_shard(&self) -> Tensor {
        slice(&self.params, &self.shard)
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
    /// Freshly initialised weights; the EMA is a copy of them (DiT), the moments are zero.
    pub fn initialise(model: &dyn Model, lanes: usize, block: LaneBlock, seed: u64, device: Device) -> Self {
        let buckets = Self::zeroed(model, lanes, block, device);
        tch::no_grad(|| {
            for bucket in &buckets.0 {
                for entry in bucket.layout.entries.iter().filter(|entry| entry.spec.init != Init::Zeros) {
                    let values = initial_values(seed, &entry.name, &entry.spec.init, entry.spec.numel());
                    slice(&bucket.params, &entry.range()).copy_(&Tensor::from_slice(&values));
                }
                bucket.ema.shallow_clone().copy_(&bucket.params_shard());
            }
        });
        buckets
    }

    /// Everything zero, to be filled from a checkpoint.
    pub fn zeroed(model: &dyn Model, lanes: usize, block: LaneBlock, device: Device) -> Self {
        let bucket = |segment: &dyn Segment| {
            let layout = BucketLayout::new(segment, lanes);
            let shard = layout.shard(block);
            Bucket::new(segment, layout, shard, device)
        };
        Self(model.segments().iter().map(|segment| bucket(&**segment)).collect())
    }

    /// Elements of all buckets, padding included.
    pub fn numel(&self) -> usize {
        self.0.iter().map(|bucket| bucket.layout.numel).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, dit};

    #[test]
    fn layouts_are_aligned_and_shards_cover_every_element_once_for_every_world_size() {
        let config = dit::DitConfig {
            input_size: 8,
            in_channels: 4,
            patch_size: 2,
            hidden_size: 36,
            depth: 1,
            num_heads: 3,
            mlp_ratio: 4.0,
            class_dropout_prob: 0.1,
            num_classes: 7,
            learn_sigma: true,
            conditioning: Default::default(),
            numerics: Default::default(),
        };
        let model = dit::Dit::new(config).unwrap();
        for lanes in [1, 2, 8] {
            for segment in model.segments() {
                let layout = BucketLayout::new(&**segment, lanes);
                assert_eq!(layout.numel % (lanes * 64), 0);
                assert!(layout.entries.windows(2).all(|w| w[0].range().end <= w[1].offset));
                assert!(layout.entries.iter().all(|e| e.offset % 16 == 0 && e.range().end <= layout.numel));
                let all_spans: Vec<_> = layout.trainable_spans(0..layout.numel).collect();
                for world_size in configs::lanes::allowed_world_sizes(lanes) {
                    let block = |rank| LaneBlock::of(rank, world_size, lanes).unwrap();
                    let shards: Vec<_> = (0..world_size).map(|rank| layout.shard(block(rank))).collect();
                    assert_eq!((shards[0].start, shards[world_size - 1].end), (0, layout.numel));
                    assert!(shards.windows(2).all(|w| w[0].end == w[1].start));
                    let spans: Vec<_> = shards.into_iter().flat_map(|s| layout.trainable_spans(s)).collect();
                    assert_eq!(spans, all_spans, "{lanes} lanes on {world_size} ranks");
                }
                assert_eq!(all_spans.iter().map(Range::len).sum::<usize>(), layout.trainable_numel);
            }
        }
    }
}
