//! The canonical tree: every sum over lanes is made in the same order, whatever the number of ranks.
//!
//! Node (k, i) is the sum over lanes [i·2^k, (i+1)·2^k); its value is node (k−1, 2i) + node (k−1, 2i+1). A rank sums its
//! nodes as they come with a binary counter ([`LaneSum`]); the nodes of several ranks are summed by [`sum_blocks`].

use super::bucket::slice;
use std::mem::swap;
use std::ops::Range;
use tch::{Device, Kind, Tensor};

/// The gradient of one bucket or of a part of it, summed over equal nodes of the tree as they come: lanes, or sums over as many
/// lanes as there are ranks in a group.
pub struct LaneSum {
    /// `levels[k]` holds a finished node whose sibling is still to come, k levels above what is pushed; log2(nodes) buffers.
    levels: Vec<Tensor>,
    nodes: usize,
    pushed: usize,
    /// Not along the tree, but each lane to the sum of those before it, in one buffer.
    running: bool,
}

impl LaneSum {
    /// For `nodes` (a power of two) nodes of `numel` elements.
    pub fn new(numel: usize, nodes: usize, device: Device) -> Self {
        let buffers = (nodes.trailing_zeros() as usize).max(1);
        let zeros = |_| Tensor::zeros([numel as i64], (Kind::Float, device));
        Self { levels: (0..buffers).map(zeros).collect(), nodes, pushed: 0, running: false }
    }

    /// For any number of nodes, added to each other in turn: not the canonical tree.
    pub fn running(numel: usize, nodes: usize, device: Device) -> Self {
        Self { nodes, running: true, ..Self::new(numel, 1, device) }
    }

    /// Bytes of its buffers.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.levels.iter().map(|level| 4 * level.numel()).sum()
    }

    /// Adds the next node, given in parts (`None` is zero; what lies in no part is never written and stays zero). With the
    /// last one the sum comes back, `[numel]`; it is valid until the next push.
    pub fn push(&mut self, parts: impl IntoIterator<Item = (Range<usize>, Option<Tensor>)>) -> Option<Tensor> {
        let index = self.pushed;
        // Level 0 holds the lane, or lanes, that this one is added to.
        let adds = if self.running { index > 0 } else { index & 1 == 1 };
        tch::no_grad(|| {
            for (range, grad) in parts {
                let mut target = slice(&self.levels[0], &range);
                match grad {
                    Some(grad) if adds => target += grad.reshape([-1]),
                    Some(grad) => target.copy_(&grad.reshape([-1])),
                    None if adds => {}
                    None => {
                        let _ = target.zero_();
                    }
                }
            }
        });
        // A finished pair is in level 0: number `node` of those over `size` nodes. Carry it up as far as siblings are waiting.
        let (mut level, mut node, mut size) = (0, index / 2, 2);
        while adds && !self.running && size < self.nodes {
            let (low, high) = self.levels.split_at_mut(level + 1);
            if node & 1 == 0 {
                swap(&mut low[level], &mut high[0]);
                break;
            }
            high[0] += &low[level];
            (level, node, size) = (level + 1, node / 2, size * 2);
        }
        self.pushed = (index + 1) % self.nodes;
        (self.pushed == 0).then(|| self.levels[level].shallow_clone())
    }
}

/// Sums the nodes of `ranks` ranks along the tree, in place.
///
/// # Shapes
/// `blocks` [ranks · n] → `[n]`, a view of the first block.
pub fn sum_blocks(blocks: &Tensor, ranks: usize) -> Tensor {
    let n = blocks.numel() / ranks;
    let block = |rank: usize| slice(blocks, &(rank * n..(rank + 1) * n));
    let mut stride = 1;
    while stride < ranks {
        for left in (0..ranks).step_by(2 * stride) {
            let mut sum = block(left);
            sum += block(left + stride);
        }
        stride *= 2;
    }
    block(0)
}

/// Sums host values, one a lane, along the tree. `values.len()` is a power of two.
pub fn sum_lanes(values: &[f64]) -> f64 {
    match values {
        [] => 0.0,
        [value] => *value,
        _ => {
            let (left, right) = values.split_at(values.len() / 2);
            sum_lanes(left) + sum_lanes(right)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mesh::Mesh;
    use super::*;
    use configs::Sharding;

    /// Elements of a bucket with one parameter of 15.
    const NUMEL: usize = 16 * 64;

    /// Values whose sum depends on the order of additions.
    fn lane_grad(lane: usize) -> Vec<f32> {
        (0..15).map(|i| ((lane * 37 + i * 11) as f32 * 0.7).sin() * 10f32.powi((lane * 5 + i) as i32 % 9 - 4)).collect()
    }

    fn tree(lanes: std::ops::Range<usize>) -> Vec<f32> {
        if lanes.len() == 1 {
            return lane_grad(lanes.start);
        }
        let middle = lanes.start + lanes.len() / 2;
        tree(lanes.start..middle).iter().zip(tree(middle..lanes.end)).map(|(a, b)| a + b).collect()
    }

    /// What the ranks of a group do with `lanes` of their own at a time, as [`super::super::gradients`] does over the wire: part
    /// number `part` of the sum over `of_ranks`.
    fn exchanged(of_ranks: &[Tensor], part: usize) -> Tensor {
        let n = of_ranks[0].numel() / of_ranks.len();
        let parts: Vec<Tensor> = of_ranks.iter().map(|whole| slice(whole, &(part * n..(part + 1) * n))).collect();
        sum_blocks(&Tensor::cat(&parts, 0), of_ranks.len())
    }

    fn gradient(lane: usize) -> (Range<usize>, Option<Tensor>) {
        (0..15, Some(Tensor::from_slice(&lane_grad(lane)).view([5, 3])))
    }

    #[test]
    fn ranks_and_lanes_sum_along_one_tree_for_every_world_size_and_sharding() {
        let lanes = 16;
        let expected = tree(0..lanes);
        let straight = (0..lanes).map(lane_grad).reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
        assert_ne!(expected, straight.unwrap(), "the test values must tell orders apart");
        for (world_size, sharding) in [1, 2, 4, 8, 16].into_iter().flat_map(|n| Sharding::ALL.map(|level| (n, level))) {
            let mesh = |rank| Mesh::of(rank, world_size, lanes, sharding, Some(4)).unwrap();
            let Mesh { shards, replicas, .. } = mesh(0);
            let per_rank = lanes / world_size;
            // The sums of the groups' lanes, [group][part]; made twice, because buffers are used again.
            let of_group = |replica: usize| -> Vec<Tensor> {
                let lanes_of = |shard: usize| mesh(replica * shards + shard).lanes_of_rank().collect::<Vec<_>>();
                if mesh(0).deals_in_turn() {
                    let of_part = |part: usize| {
                        let mut sum = LaneSum::new(NUMEL / shards, per_rank, Device::Cpu);
                        let mut push = |index: usize| {
                            let flat = |shard: usize| {
                                let mut flat = LaneSum::new(NUMEL, 1, Device::Cpu);
                                flat.push([gradient(lanes_of(shard)[index % per_rank])]).unwrap()
                            };
                            let node = exchanged(&(0..shards).map(flat).collect::<Vec<_>>(), part);
                            sum.push([(0..NUMEL / shards, Some(node))])
                        };
                        (0..2 * per_rank).filter_map(&mut push).last().unwrap().copy()
                    };
                    (0..shards).map(of_part).collect()
                } else {
                    let block = |shard: usize| {
                        let mut sum = LaneSum::new(NUMEL, per_rank, Device::Cpu);
                        let twice = lanes_of(shard).repeat(2);
                        twice.into_iter().filter_map(|lane| sum.push([gradient(lane)])).last().unwrap().copy()
                    };
                    let blocks: Vec<Tensor> = (0..shards).map(block).collect();
                    (0..shards).map(|part| exchanged(&blocks, part)).collect()
                }
            };
            let of_groups: Vec<Vec<Tensor>> = (0..replicas).map(of_group).collect();
            let held = |part: usize| {
                let nodes: Vec<Tensor> = of_groups.iter().map(|parts| parts[part].copy()).collect();
                Tensor::cat(&(0..replicas).map(|own| exchanged(&nodes, own)).collect::<Vec<_>>(), 0)
            };
            let root = Tensor::cat(&(0..shards).map(held).collect::<Vec<_>>(), 0);
            let found: Vec<f32> = Vec::try_from(root).unwrap();
            assert_eq!(found[..15], expected[..], "{world_size} ranks, {sharding:?}");
            assert!(found.len() == NUMEL && found[15..].iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn a_running_sum_takes_any_number_of_lanes() {
        let mut sum = LaneSum::running(NUMEL, 3, Device::Cpu);
        let straight: Vec<f32> =
            (0..3).map(lane_grad).reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect()).unwrap();
        for lane in (0..3).chain(0..3) {
            let done = sum.push([gradient(lane)]);
            assert_eq!(done.is_some(), lane == 2);
            if let Some(done) = done {
                assert_eq!(Vec::<f32>::try_from(done).unwrap()[..15], straight[..]);
            }
        }
    }

    #[test]
    fn host_sums_follow_the_same_tree() {
        let values: Vec<f64> = (0..8).map(|lane| lane_grad(lane)[3] as f64 * 1e-7).collect();
        let by_hand =
            ((values[0] + values[1]) + (values[2] + values[3])) + ((values[4] + values[5]) + (values[6] + values[7]));
        assert_eq!(sum_lanes(&values), by_hand);
    }
}
