//! Turns each rank's block sums into this rank's shard of the mean gradient, one bucket at a time, while the next
//! segment computes.

use super::bucket::Bucket;
use super::tree::sum_blocks;
use super::wire::{Summation, WireClock};
use crate::ffi::region;
use collective::{Collective, CollectiveError, Pending, ReduceOp};
use tch::{Kind, Tensor};

/// The reduction of one step's gradients over the ranks.
pub struct Reducer {
    lanes: usize,
    summation: Summation,
    slots: Vec<Slot>,
}

struct Slot {
    /// For this rank's shard: the block sums of all ranks, [world_size · shard], or where the backend adds them their sum,
    /// `[shard]`. Empty at world size 1.
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
    pub fn new(buckets: &[Bucket], lanes: usize, world_size: usize, summation: Summation) -> Self {
        let slot = |bucket: &Bucket| {
            let (numel, kind) = match summation {
                _ if world_size == 1 => (0, Kind::Float),
                Summation::Tree => (bucket.layout.numel, Kind::Float),
                Summation::Backend(kind) => (bucket.layout.numel / world_size, kind),
            };
            let received = Tensor::zeros([numel as i64], (kind, bucket.params.device()));
            Slot { received, state: State::Idle }
        };
        Self { lanes, summation, slots: buckets.iter().map(slot).collect() }
    }

    /// Hands over the finished block sum of bucket `index`; returns at once. All ranks call it for the same buckets in
    /// the same order.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn start(&mut self, collective: &dyn Collective, index: usize, block: Tensor) -> Result<(), CollectiveError> {
        let slot = &mut self.slots[index];
        slot.state = match self.summation {
            _ if collective.world_size() == 1 => State::Local(block),
            Summation::Tree => State::Exchanging(collective.all_to_all(region(&block), region(&slot.received))?),
            Summation::Backend(kind) => {
                let (send, recv) = (region(&block.to_kind(kind)), region(&slot.received));
                State::Exchanging(collective.reduce_scatter(send, Some(recv), ReduceOp::Sum)?)
            }
        };
        Ok(())
    }

    /// Waits for all buckets and finishes the sums: the mean gradient of this rank's shard of every bucket. Valid
    /// until the next step.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn finish(
        &mut self,
        collective: &dyn Collective,
        clock: &mut WireClock,
    ) -> Result<Vec<Tensor>, CollectiveError> {
        let (scale, summation) = (1.0 / self.lanes as f64, self.summation);
        let finish = |(index, slot): (usize, &mut Slot)| {
            let mut root = match std::mem::replace(&mut slot.state, State::Idle) {
                State::Exchanging(pending) => {
                    clock.wait(pending, collective.deadline(), "reduce", index)?;
                    match summation {
                        Summation::Tree => sum_blocks(&slot.received, collective.world_size()),
                        Summation::Backend(_) => slot.received.to_kind(Kind::Float),
                    }
                }
                State::Local(block) => block,
                State::Idle => {
                    let (rank, op) = (collective.rank(), "reduce");
                    let reason = "a bucket was never handed to the reducer".to_owned();
                    return Err(CollectiveError::Backend { rank, op, reason });
                }
            };
            root *= scale;
            Ok(root)
        };
        self.slots.iter_mut().enumerate().map(finish).collect()
    }
}
