//! From the gradients of lanes, segment by segment, to the mean gradient of what this rank holds.

use super::bucket::{Bucket, BucketLayout, slice};
use super::ranks::Ranks;
use super::reducer::{Exchange, OfEach, Reducer, room};
use super::tree::LaneSum;
use super::wire::Summation;
use collective::CollectiveError;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Sums gradients over all lanes along the canonical tree. All ranks make the same calls in the same order.
pub trait GradientSum {
    /// Adds the gradients of a lane in bucket `index`, those of its trainable parameters in layout order (`None` is zero).
    ///
    /// # Errors
    /// What the collective reports.
    fn push(&mut self, bucket: &Bucket, index: usize, grads: Vec<Option<Tensor>>) -> Result<(), CollectiveError>;

    /// The mean of bucket `index` before the others, where every rank holds what it answers for; further buckets have been pushed in the last lane
    /// since. [`GradientSum::finish`] gives it again.
    ///
    /// # Errors
    /// What the collective reports.
    fn mean(&mut self, index: usize, lanes: usize) -> Result<Tensor, CollectiveError>;

    /// After all lanes and buckets: the mean gradient over `lanes` lanes, those that are not left out, of the held part of every
    /// bucket. Valid until the next push. `each` works while the wire does.
    ///
    /// # Errors
    /// What the collective reports.
    fn finish(&mut self, lanes: usize, each: OfEach) -> Result<Vec<Tensor>, CollectiveError>;

    /// Bytes of its buffers: [sums, what comes in from other ranks].
    #[cfg(test)]
    fn held_bytes(&self) -> [usize; 2];
}

/// The sum for these ranks.
pub fn sum(ranks: Arc<Ranks>, buckets: &[Bucket]) -> Box<dyn GradientSum> {
    let (mesh, summation) = (ranks.mesh, ranks.summation);
    let lane_sum = |numel, lanes, device| match summation {
        Summation::Tree => LaneSum::new(numel, lanes, device),
        Summation::Backend(_) => LaneSum::running(numel, lanes, device),
    };
    let reducer = Reducer::new(buckets, ranks);
    let lanes = mesh.lanes_per_rank();
    if mesh.deals_in_turn() && mesh.shards > 1 {
        let sum = |bucket: &Bucket| lane_sum(bucket.layout.shard(mesh.part()).len(), lanes, bucket.held.device());
        Box::new(LaneByLane { sums: buckets.iter().map(sum).collect(), reducer, on_the_wire: None })
    } else {
        let sum = |bucket: &Bucket| lane_sum(bucket.layout.numel, lanes, bucket.held.device());
        Box::new(AllLanes { sums: buckets.iter().map(sum).collect(), reducer })
    }
}

/// A rank sums its lanes, then the ranks exchange their sums: the least on the wire. In the last lane each finished bucket
/// travels while the next segment computes.
struct AllLanes {
    sums: Vec<LaneSum>,
    reducer: Reducer,
}

impl GradientSum for AllLanes {
    fn push(&mut self, bucket: &Bucket, index: usize, grads: Vec<Option<Tensor>>) -> Result<(), CollectiveError> {
        match self.sums[index].push(parts(&bucket.layout, grads)) {
            Some(block) => self.reducer.start(index, block),
            None => Ok(()),
        }
    }

    fn mean(&mut self, index: usize, lanes: usize) -> Result<Tensor, CollectiveError> {
        self.reducer.mean(index, lanes)
    }

    fn finish(&mut self, lanes: usize, each: OfEach) -> Result<Vec<Tensor>, CollectiveError> {
        self.reducer.finish(lanes, each)
    }

    #[cfg(test)]
    fn held_bytes(&self) -> [usize; 2] {
        [self.sums.iter().map(LaneSum::bytes).sum(), self.reducer.room_bytes()]
    }
}

/// The gradients of every lane leave the rank as soon as their segment is done; a rank sums its part only. In exchange for
/// the memory they travel once a lane instead of once a step.
struct LaneByLane {
    /// Of this rank's parts, over what the group computes at a time.
    sums: Vec<LaneSum>,
    reducer: Reducer,
    /// The bucket that travels while the next segment computes.
    on_the_wire: Option<(usize, Exchange)>,
}

impl LaneByLane {
    fn arrive(&mut self, sent: Option<(usize, Exchange)>) -> Result<(), CollectiveError> {
        let Some((index, exchange)) = sent else { return Ok(()) };
        let node = exchange.finish(&self.reducer.ranks, index)?;
        match self.sums[index].push([(0..node.numel(), Some(node))]) {
            Some(sum) => self.reducer.start_among_peers(index, sum),
            None => Ok(()),
        }
    }
}

impl GradientSum for LaneByLane {
    fn push(&mut self, bucket: &Bucket, index: usize, grads: Vec<Option<Tensor>>) -> Result<(), CollectiveError> {
        let flat = flat(&bucket.layout, grads, bucket.held.device());
        let ranks = &self.reducer.ranks;
        let received = room(ranks, flat.numel(), ranks.mesh.shards, flat.device());
        let exchange = Exchange::start(ranks.group(), ranks.summation, flat, received)?;
        let before = self.on_the_wire.replace((index, exchange));
        self.arrive(before)
    }

    fn mean(&mut self, index: usize, lanes: usize) -> Result<Tensor, CollectiveError> {
        self.reducer.mean(index, lanes)
    }

    fn finish(&mut self, lanes: usize, each: OfEach) -> Result<Vec<Tensor>, CollectiveError> {
        let last = self.on_the_wire.take();
        self.arrive(last)?;
        self.reducer.finish(lanes, each)
    }

    #[cfg(test)]
    fn held_bytes(&self) -> [usize; 2] {
        [self.sums.iter().map(LaneSum::bytes).sum(), self.reducer.room_bytes()]
    }
}

/// Gradients with their places in the bucket; trainable parameters come first there.
fn parts(
    layout: &BucketLayout,
    grads: Vec<Option<Tensor>>,
) -> impl Iterator<Item = (Range<usize>, Option<Tensor>)> + '_ {
    layout.entries.iter().map(|entry| entry.range()).zip(grads)
}

/// Gradients as one tensor of the bucket's layout; padding and frozen parameters are zero.
pub fn flat(layout: &BucketLayout, grads: Vec<Option<Tensor>>, device: Device) -> Tensor {
    let flat = Tensor::zeros([layout.numel as i64], (Kind::Float, device));
    tch::no_grad(|| {
        for (range, grad) in parts(layout, grads) {
            if let Some(grad) = grad {
                slice(&flat, &range).copy_(&grad.reshape([-1]));
            }
        }
    });
    flat
}
