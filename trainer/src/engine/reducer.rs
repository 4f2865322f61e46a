//! Turns each rank's block sums into this rank's shard of the mean gradient, one bucket at a time, while the next
//! segment computes.

use super::bucket::Bucket;
use super::tree::sum_blocks;
use crate::ffi::region;
use collective::{Collective, CollectiveError, Pending};
use tch::{Kind, Tensor};

/// The reduction of one step's gradients over the ranks.
pub struct Reducer {
    lanes: usize,
    slots: Vec<Slot>,
}

struct Slot {
    /// The block sums of all ranks for this rank's shard, [world_size · shard]; empty at world size 1.
    received: Tensor,
    state: State,
}

enum State {
    Idle,
    /// On the wire; the block sum is kept until the exchange is over.
    Exchanging(Pending),
    /// World size 1: the block is the whole tree.
    Local(Tensor),
}

impl Reducer {
    /// For these buckets.
    pub fn new(buckets: &[Bucket], lanes: usize, world_size: usize) -> Self {
        let slot = |bucket: &Bucket| {
            let numel = if world_size > 1 { bucket.layout.numel as i64 } else { 0 };
            let received = Tensor::zeros([numel], (Kind::Float, bucket.params.device()));
            Slot { received, state: State::Idle }
        };
        Self { lanes, slots: buckets.iter().map(slot).collect() }
    }

    /// Hands over the finished block sum of bucket `index`; returns at once. All ranks call it for the same buckets in
    /// the same order.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn start(&mut self, collective: &dyn Collective, index: usize, block: Tensor) -> Result<(), CollectiveError> {
        let slot = &mut self.slots[index];
        slot.state = if collective.world_size() > 1 {
            State::Exchanging(collective.all_to_all(region(&block), region(&slot.received))?)
        } else {
            State::Local(block)
        };
        Ok(())
    }

    /// Waits for all buckets and finishes the tree: the mean gradient of this rank's shard of every bucket. Valid
    /// until the next step.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn finish(&mut self, collective: &dyn Collective) -> Result<Vec<Tensor>, CollectiveError> {
        let scale = 1.0 / self.lanes as f64;
        let finish = |slot: &mut Slot| {
            let mut root = match std::mem::replace(&mut slot.state, State::Idle) {
                State::Exchanging(pending) => {
                    pending.wait(collective.deadline())?;
                    sum_blocks(&slot.received, collective.world_size())
                }
                State::Local(block) => block,
                State::Idle => {
                    let (rank, op) = (collective.rank(), "all_to_all");
                    let reason = "a bucket was never handed to the reducer".to_owned();
                    return Err(CollectiveError::Backend { rank, op, reason });
                }
            };
            root *= scale;
            Ok(root)
        };
        self.slots.iter_mut().map(finish).collect()
    }
}
