//! Bytes between ranks in a step. Sums along the canonical tree move by all-to-all, where every rank sends each other its part;
//! gathers, and sums by the backend, are taken to run around rings in the order of the ranks, as NCCL's do.

use std::collections::BTreeMap;

use configs::{Reduction, ReductionDtype, RunConfig};
use serde::Serialize;

use crate::memory::Sizes;

/// What crosses the wire in one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Wire {
    /// Bytes that a rank sends for sums of gradients.
    pub gradients_bytes_per_rank: u64,
    /// Bytes that a rank sends for gathers of weights.
    pub weights_bytes_per_rank: u64,
    /// Bytes of gradients that leave a node.
    pub gradients_bytes_per_node: u64,
    /// Bytes of weights that leave a node.
    pub weights_bytes_per_node: u64,
    /// Bytes that leave a node through each of its network interfaces.
    pub bytes_per_nic: u64,
}

/// How an exchange runs.
#[derive(Clone, Copy)]
enum Pattern {
    /// Every rank sends every other its part.
    Pairs,
    /// Every rank sends its neighbour all parts but one.
    Ring,
}

/// An exchange of so many bytes among the ranks of groups that are spread over nodes.
struct Among {
    size: usize,
    /// How many ranks of one node each group has there.
    here: Vec<usize>,
}

impl Among {
    fn new(size: usize, group_of: impl Fn(usize) -> usize, ranks_per_node: usize) -> Among {
        let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
        (0..ranks_per_node).for_each(|rank| *counts.entry(group_of(rank)).or_default() += 1);
        Among { size, here: counts.into_values().collect() }
    }

    /// Bytes that a rank sends, and that leave a node.
    fn exchange(&self, bytes: f64, pattern: Pattern) -> [f64; 2] {
        let size = self.size as f64;
        let leaves = |here: &usize| match pattern {
            _ if *here == self.size => 0.0,
            Pattern::Pairs => *here as f64 * (size - *here as f64) / size * bytes,
            Pattern::Ring => (size - 1.0) / size * bytes,
        };
        [(size - 1.0) / size * bytes, self.here.iter().map(leaves).sum()]
    }
}

/// What a step of `sizes` sends, on nodes of `ranks_per_node` ranks with `nics` network interfaces.
pub fn wire(sizes: &Sizes, config: &RunConfig, nodes: usize, ranks_per_node: usize, nics: usize) -> Wire {
    let groups = &sizes.groups;
    let (shards, replicas) = (groups.shards, groups.replicas);
    let group = Among::new(shards, |rank| rank / shards, ranks_per_node);
    let peers = Among::new(replicas, |rank| rank % shards, ranks_per_node);
    let (pattern, width) = match (config.reduction, config.reduction_dtype) {
        (Reduction::Invariant, _) => (Pattern::Pairs, 4.0),
        (Reduction::Fast, ReductionDtype::Fp32) => (Pattern::Ring, 4.0),
        (Reduction::Fast, ReductionDtype::Bf16) => (Pattern::Ring, 2.0),
    };
    let (mut gradients, mut weights) = ([0.0; 2], [0.0; 2]);
    let add = |sum: &mut [f64; 2], times: f64, [rank, node]: [f64; 2]| {
        *sum = [sum[0] + times * rank, sum[1] + times * node];
    };
    let lanes = groups.lanes_per_rank as f64;
    for (index, bucket) in sizes.buckets.iter().enumerate() {
        let (whole, part) = (bucket.numel as f64, groups.part(bucket) as f64);
        let times = if groups.shares_out_gradients() { lanes } else { 1.0 };
        add(&mut gradients, times, group.exchange(width * whole, pattern));
        add(&mut gradients, 1.0, peers.exchange(width * part, pattern));
        // Mean gradients go back where several ranks hold the same, new weights where each holds its own.
        let back = if groups.over_all { &mut weights } else { &mut gradients };
        add(back, 1.0, peers.exchange(4.0 * part, Pattern::Ring));
        // Forwards and backwards in every lane; the last segment once, and the first only where lanes do not meet.
        let times = match groups.shares_out_weights() {
            false => 1.0,
            true if index + 1 == sizes.buckets.len() => lanes,
            true if index == 0 => lanes + 1.0,
            true => 2.0 * lanes,
        };
        add(&mut weights, times, group.exchange(4.0 * whole, Pattern::Ring));
    }
    let per_node = |[_, node]: [f64; 2]| if nodes > 1 { node } else { 0.0 };
    Wire {
        gradients_bytes_per_rank: gradients[0] as u64,
        weights_bytes_per_rank: weights[0] as u64,
        gradients_bytes_per_node: per_node(gradients) as u64,
        weights_bytes_per_node: per_node(weights) as u64,
        bytes_per_nic: ((per_node(gradients) + per_node(weights)) / nics.max(1) as f64) as u64,
    }
}
