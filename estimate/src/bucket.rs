//! Flat buffers: where a segment's parameters lie, and how many elements a rank holds of them.

use std::ops::Range;

use configs::{OnDivergence, Reduction, RunConfig, Sharding};

use crate::model::{Param, Segment};

/// Every parameter starts at a multiple of this many elements.
const ALIGN_NUMEL: usize = 16;
/// A bucket is padded to lanes × this many elements.
const FINEST_ALIGN_NUMEL: usize = 64;

/// A segment's parameters in one flat buffer.
#[derive(Debug, Clone)]
pub struct Bucket {
    /// Elements, padding included.
    pub numel: usize,
    /// Where each parameter lies; trainable ones first.
    entries: Vec<(bool, Range<usize>)>,
}

impl Bucket {
    /// The layout for so many lanes.
    pub fn new(segment: &Segment, lanes: usize) -> Bucket {
        let (trainable, frozen): (Vec<&Param>, Vec<&Param>) = segment.params.iter().partition(|param| param.trainable);
        let mut end: usize = 0;
        let place = |param: &Param| {
            let range = end..end + param.numel();
            end = range.end.next_multiple_of(ALIGN_NUMEL);
            (param.trainable, range)
        };
        let entries = trainable.into_iter().chain(frozen).map(place).collect();
        Bucket { numel: end.next_multiple_of(lanes * FINEST_ALIGN_NUMEL), entries }
    }

    /// Elements of `part` from its first parameter to its last: what a checkpoint copies.
    fn span(&self, part: &Range<usize>, trainable_only: bool) -> usize {
        let inside = |(trainable, range): &(bool, Range<usize>)| {
            let (first, end) = (range.start.max(part.start), range.end.min(part.end));
            ((*trainable || !trainable_only) && first < end).then_some(first..end)
        };
        let mut spans = self.entries.iter().filter_map(inside);
        spans.next().map_or(0, |first| spans.next_back().unwrap_or(first.clone()).end - first.start)
    }
}

/// How ranks share what belongs to the weights: `replicas` groups of `shards` consecutive ranks, each with one copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Groups {
    /// What is shared out.
    pub sharding: Sharding,
    /// Ranks of a group.
    pub shards: usize,
    /// Groups.
    pub replicas: usize,
    /// Lanes that a rank runs in a step.
    pub lanes_per_rank: usize,
    /// Lanes of the experiment.
    pub lanes: usize,
    /// What is shared out is so among all ranks; the groups, which are nodes, are the way there.
    pub over_all: bool,
}

impl Groups {
    /// Those of `world_size` ranks, of which the lanes must be a multiple, on nodes of `ranks_per_node`.
    pub fn of(config: &RunConfig, world_size: usize, ranks_per_node: usize) -> Groups {
        let train = &config.train;
        let node_ranks = config.collective.node_ranks.unwrap_or(ranks_per_node);
        let most = train.sharding_ranks.unwrap_or(world_size).min(world_size);
        let shards = match train.sharding {
            Sharding::Nothing => 1,
            _ => (1..=most).rev().find(|ranks| world_size.is_multiple_of(*ranks)).unwrap_or(1),
        };
        let are_nodes = (2..world_size).contains(&node_ranks) && world_size.is_multiple_of(node_ranks);
        let over_all = shards == world_size && are_nodes && train.sharding != Sharding::Weights;
        let shards = if over_all { node_ranks } else { shards };
        Groups {
            sharding: train.sharding,
            shards,
            replicas: world_size / shards,
            lanes_per_rank: (train.lanes / world_size).max(1),
            lanes: train.lanes,
            over_all,
        }
    }

    /// Whether gradients leave a rank lane by lane, so that it sums its part only.
    pub fn shares_out_gradients(&self) -> bool {
        self.sharding >= Sharding::Gradients && self.shards > 1
    }

    /// Whether a rank has the weights of a segment only while it computes.
    pub fn shares_out_weights(&self) -> bool {
        self.sharding == Sharding::Weights && self.shards > 1
    }

    /// Whether the update of some weights need not wait for all gradients, see `trainer/src/engine/stepper.rs`.
    pub fn updates_ahead(&self, config: &RunConfig) -> bool {
        let shares = self.shards > 1 && (self.replicas == 1 || self.over_all) && !self.shares_out_weights();
        shares && config.optimizer.clip_grad_norm.is_none() && config.divergence.policy != OnDivergence::Skip
    }

    /// Elements of a bucket that come to a rank in its group.
    pub fn part(&self, bucket: &Bucket) -> usize {
        bucket.numel / self.shards
    }

    /// Elements of a bucket whose state a rank holds.
    pub fn held(&self, bucket: &Bucket) -> usize {
        self.part(bucket) / if self.over_all { self.replicas } else { 1 }
    }

    /// Elements that a rank copies for a checkpoint: of what it answers for, in `weights` sections with all parameters and
    /// `moments` sections with the trainable ones. The most of any rank.
    pub fn snapshot(&self, buckets: &[Bucket], weights: usize, moments: usize) -> usize {
        let parts = self.shards * self.replicas;
        let of_part = |part: usize| {
            let of_bucket = |bucket: &Bucket| {
                let len = bucket.numel / parts;
                let part = part * len..(part + 1) * len;
                weights * bucket.span(&part, false) + moments * bucket.span(&part, true)
            };
            buckets.iter().map(of_bucket).sum()
        };
        // Parts are nearly alike; of thousands the first and last will do.
        (0..parts).filter(|part| parts <= 64 || *part < 32 || *part >= parts - 32).map(of_part).max().unwrap_or(0)
    }

    /// Buffers that sum the lanes of a rank.
    pub fn sum_buffers(&self, reduction: Reduction) -> usize {
        match reduction {
            Reduction::Invariant => (self.lanes_per_rank.trailing_zeros() as usize).max(1),
            Reduction::Fast => 1,
        }
    }
}
