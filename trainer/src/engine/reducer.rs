//! Sums over ranks along the tree, one bucket at a time, while other segments compute: first in the group, each rank its part,
//! then of this part among its peers in other groups.

use super::bucket::{Bucket, slice};
use super::ranks::Ranks;
use super::tree::sum_blocks;
use super::wire::Summation;
use crate::ffi::region;
use collective::{Collective, CollectiveError, Pending, ReduceOp};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Equal nodes of the tree, one a rank, on their way to be summed: part r of every rank's node goes to rank r.
pub struct Exchange {
    /// What comes in; with one rank the node itself.
    received: Tensor,
    pending: Option<Pending>,
    /// Of how many nodes `received` consists.
    nodes: usize,
}

/// Is given each bucket's mean gradient of what this rank answers for, as it is there.
pub type OfEach<'a> = &'a mut dyn FnMut(usize, &Tensor);

/// Room for what comes in when `numel` elements are exchanged among `count` ranks.
pub fn room(ranks: &Ranks, numel: usize, count: usize, device: Device) -> Tensor {
    let (numel, kind) = match ranks.summation {
        _ if count == 1 => (0, Kind::Float),
        Summation::Tree => (numel, Kind::Float),
        Summation::Backend(kind) => (numel / count, kind),
    };
    Tensor::zeros([numel as i64], (kind, device))
}

impl Exchange {
    /// Sends this rank's `node`, into [`room`] that the others have for it; returns at once.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn start(
        among: &dyn Collective,
        summation: Summation,
        node: Tensor,
        received: Tensor,
    ) -> Result<Self, CollectiveError> {
        let nodes = among.world_size();
        let (pending, nodes) = match summation {
            _ if nodes == 1 => return Ok(Self { received: node, pending: None, nodes }),
            Summation::Tree => (among.all_to_all(region(&node), region(&received))?, nodes),
            Summation::Backend(kind) => {
                let (send, recv) = (region(&node.to_kind(kind)), region(&received));
                (among.reduce_scatter(send, Some(recv), ReduceOp::Sum)?, 1)
            }
        };
        Ok(Self { received, pending: Some(pending), nodes })
    }

    /// Waits, and sums: this rank's part of the node above, of bucket `index`.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn finish(self, ranks: &Ranks, index: usize) -> Result<Tensor, CollectiveError> {
        ranks.finish(self.pending, "reduce", index)?;
        Ok(sum_blocks(&self.received.to_kind(Kind::Float), self.nodes))
    }
}

/// The reduction of one step's gradients over the ranks.
pub struct Reducer {
    pub(super) ranks: Arc<Ranks>,
    slots: Vec<Slot>,
    /// The bucket whose sum in the group is waited for when the next one is handed over.
    in_group: Option<usize>,
}

struct Slot {
    /// What comes in from the group, of a whole bucket, and from peers, of this rank's part of it; empty where nobody sends.
    received: [Tensor; 2],
    /// Elements of the part that this rank answers for.
    own: std::ops::Range<usize>,
    state: State,
}

enum State {
    Idle,
    InGroup(Exchange),
    /// With the group's sum, whose memory takes the result.
    AmongPeers(Exchange, Tensor),
    /// Finished before the others.
    Mean(Tensor),
}

impl Reducer {
    /// For these buckets.
    pub fn new(buckets: &[Bucket], ranks: Arc<Ranks>) -> Self {
        let mesh = ranks.mesh;
        let slot = |bucket: &Bucket| {
            let shards = if mesh.deals_in_turn() { 1 } else { mesh.shards };
            let from_group = room(&ranks, bucket.layout.numel, shards, bucket.held.device());
            let part = bucket.layout.shard(mesh.part());
            let from_peers = room(&ranks, part.len(), mesh.replicas, bucket.held.device());
            let own = bucket.own.start - part.start..bucket.own.end - part.start;
            Slot { received: [from_group, from_peers], own, state: State::Idle }
        };
        Self { slots: buckets.iter().map(slot).collect(), ranks, in_group: None }
    }

    /// Bytes of the room for what comes in.
    #[cfg(test)]
    pub(super) fn room_bytes(&self) -> usize {
        let rooms = self.slots.iter().flat_map(|slot| &slot.received);
        rooms.map(|room| room.numel() * room.kind().elt_size_in_bytes()).sum()
    }

    /// Hands over this rank's sum of bucket `index`, a node of the tree; returns without waiting for it. All ranks call it
    /// for the same buckets in the same order.
    ///
    /// # Errors
    /// What the collective reports.
    pub fn start(&mut self, index: usize, node: Tensor) -> Result<(), CollectiveError> {
        let slot = &mut self.slots[index];
        let received = slot.received[0].shallow_clone();
        let exchange = Exchange::start(self.ranks.group(), self.ranks.summation, node, received)?;
        slot.state = State::InGroup(exchange);
        let before = self.in_group.replace(index);
        match (self.ranks.mesh.shards, self.ranks.mesh.replicas) {
            // With no other group there is nothing to start.
            (_, 1) => Ok(()),
            // And with no other rank in this one nothing to wait for.
            (1, _) => self.climb(Some(index)),
            _ => self.climb(before),
        }
    }

    /// Hands over this rank's part of the group's sum of bucket `index`.
    ///
    /// # Errors
    /// What the collective reports.
    pub fn start_among_peers(&mut self, index: usize, sum: Tensor) -> Result<(), CollectiveError> {
        let slot = &mut self.slots[index];
        let received = slot.received[1].shallow_clone();
        let exchange = Exchange::start(self.ranks.peers(), self.ranks.summation, sum.shallow_clone(), received)?;
        slot.state = State::AmongPeers(exchange, sum);
        Ok(())
    }

    /// Waits for the group's sum of a bucket and hands it over to the peers.
    fn climb(&mut self, index: Option<usize>) -> Result<(), CollectiveError> {
        let Some(index) = index else { return Ok(()) };
        match std::mem::replace(&mut self.slots[index].state, State::Idle) {
            State::InGroup(exchange) => {
                let sum = exchange.finish(&self.ranks, index)?;
                self.start_among_peers(index, sum)
            }
            other => {
                self.slots[index].state = other;
                Ok(())
            }
        }
    }

    /// Waits for bucket `index` alone and finishes its tree, where a rank holds what it answers for: what [`Reducer::finish`] gives again.
    ///
    /// # Errors
    /// What the collective reports.
    pub fn mean(&mut self, index: usize, lanes: usize) -> Result<Tensor, CollectiveError> {
        self.climb(Some(index))?;
        let (mean, _) = self.root(index, lanes)?;
        self.slots[index].state = State::Mean(mean.shallow_clone());
        Ok(mean)
    }

    /// Waits for the last exchange of a bucket: the mean of what this rank answers for, and the group's sum.
    fn root(&mut self, index: usize, lanes: usize) -> Result<(Tensor, Tensor), CollectiveError> {
        match std::mem::replace(&mut self.slots[index].state, State::Idle) {
            State::AmongPeers(exchange, sum) => {
                let mut root = exchange.finish(&self.ranks, index)?;
                root *= 1.0 / lanes as f64;
                Ok((root, sum))
            }
            State::Mean(mean) => Ok((mean.shallow_clone(), mean)),
            _ => {
                let (rank, op) = (self.ranks.all.rank(), "reduce");
                let reason = "a bucket was never handed to the reducer".to_owned();
                Err(CollectiveError::Backend { rank, op, reason })
            }
        }
    }

    /// Waits for all buckets, in the order of the backward pass and the wire, and finishes the tree: see [`super::gradients::GradientSum::finish`].
    ///
    /// # Errors
    /// What the collective reports.
    pub fn finish(&mut self, lanes: usize, each: OfEach) -> Result<Vec<Tensor>, CollectiveError> {
        self.in_group = None;
        let (mut gathers, mut means) = (Vec::new(), Vec::with_capacity(self.slots.len()));
        let buckets = (0..self.slots.len()).rev();
        if self.ranks.mesh.replicas > 1 {
            // What has yet to go to the peers goes before anything from there is waited for.
            buckets.clone().try_for_each(|index| self.climb(Some(index)))?;
        }
        for index in buckets {
            self.climb(Some(index))?;
            let (root, sum) = self.root(index, lanes)?;
            each(index, &root);
            if self.ranks.mesh.held() == self.ranks.mesh.own() {
                means.push(root);
                continue;
            }
            slice(&sum, &self.slots[index].own).copy_(&root);
            gathers.push((index, self.ranks.peers().all_gather(None, region(&sum))?));
            means.push(sum);
        }
        for (index, gather) in gathers {
            self.ranks.finish(Some(gather), "reduce", index)?;
        }
        means.reverse();
        Ok(means)
    }
}
