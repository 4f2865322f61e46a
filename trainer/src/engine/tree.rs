//! The canonical tree: every sum over lanes is made in the same order, whatever the number of ranks.
//!
//! Node (k, i) is the sum over lanes [i·2^k, (i+1)·2^k); its value is node (k−1, 2i) + node (k−1, 2i+1). A rank sums its
//! own aligned block of lanes with a binary counter ([`LaneSum`]); the ranks' blocks are nodes of the same tree, summed
//! by [`sum_blocks`].

use super::bucket::{BucketLayout, slice};
use std::mem::swap;
use tch::{Device, Kind, Tensor};

/// The gradient of one bucket, summed over this rank's lanes as they come.
pub struct LaneSum {
    /// `levels[k]` holds a finished node of level k whose sibling is still to come; log2(lanes of this rank) buffers.
    levels: Vec<Tensor>,
    lanes: usize,
    pushed: usize,
    /// Not along the tree, but each lane to the sum of those before it, in one buffer.
    running: bool,
}

impl LaneSum {
    /// For `lanes` (a power of two) lanes of this rank.
    pub fn new(layout: &BucketLayout, lanes: usize, device: Device) -> Self {
        let buffers = (lanes.trailing_zeros() as usize).max(1);
        let zeros = |_| Tensor::zeros([layout.numel as i64], (Kind::Float, device));
        Self { levels: (0..buffers).map(zeros).collect(), lanes, pushed: 0, running: false }
    }

    /// For any number of lanes of this rank, added to each other in turn: not the canonical tree.
    pub fn running(layout: &BucketLayout, lanes: usize, device: Device) -> Self {
        Self { lanes, running: true, ..Self::new(layout, 1, device) }
    }

    /// Adds the next lane's gradients of the trainable parameters, in layout order (`None` is zero). With the last
    /// lane the block's sum comes back, `[numel]`; it is valid until the next push.
    ///
    /// Padding and frozen parameters are never written and stay zero.
    pub fn push(&mut self, layout: &BucketLayout, grads: Vec<Option<Tensor>>) -> Option<Tensor> {
        let index = self.pushed;
        // Level 0 holds the lane, or lanes, that this one is added to.
        let adds = if self.running { index > 0 } else { index & 1 == 1 };
        tch::no_grad(|| {
            for (entry, grad) in layout.entries.iter().zip(grads) {
                let mut target = slice(&self.levels[0], &entry.range());
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
        // A finished pair is in level 0: node `node` of `size` lanes. Carry it up as far as siblings are waiting.
        let (mut level, mut node, mut size) = (0, index / 2, 2);
        while adds && !self.running && size < self.lanes {
            let (low, high) = self.levels.split_at_mut(level + 1);
            if node & 1 == 0 {
                swap(&mut low[level], &mut high[0]);
                break;
            }
            high[0] += &low[level];
            (level, node, size) = (level + 1, node / 2, size * 2);
        }
        self.pushed = (index + 1) % self.lanes;
        (self.pushed == 0).then(|| self.levels[level].shallow_clone())
    }
}

/// Sums the blocks of `world_size` ranks along the tree, in place.
///
/// # Shapes
/// `blocks` [world_size · n] → `[n]`, a view of the first block.
pub fn sum_blocks(blocks: &Tensor, world_size: usize) -> Tensor {
    let n = blocks.numel() / world_size;
    let block = |rank: usize| slice(blocks, &(rank * n..(rank + 1) * n));
    let mut stride = 1;
    while stride < world_size {
        for left in (0..world_size).step_by(2 * stride) {
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
    use super::*;
    use crate::model::{Flow, Init, ParamSpec, Probe, Segment, Weights};

    struct OneTensor;
    impl Segment for OneTensor {
        fn prefix(&self) -> &str {
            "s."
        }
        fn params(&self) -> Vec<ParamSpec> {
            vec![ParamSpec { name: "w".to_owned(), shape: vec![5, 3], init: Init::Zeros, trainable: true }]
        }
        fn forward(&self, _: &Weights, _: &Flow, _: Probe) -> Flow {
            Flow::default()
        }
    }

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

    #[test]
    fn ranks_and_lanes_sum_along_one_tree_for_every_world_size() {
        let lanes = 16;
        let layout = BucketLayout::new(&OneTensor, lanes);
        let expected = tree(0..lanes);
        let straight = (0..lanes).map(lane_grad).reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect());
        assert_ne!(expected, straight.unwrap(), "the test values must tell orders apart");
        for world_size in [1, 2, 4, 8, 16] {
            let per_rank = lanes / world_size;
            let block = |rank: usize| {
                let mut sum = LaneSum::new(&layout, per_rank, Device::Cpu);
                for repeat in 0..2 {
                    for lane in 0..per_rank {
                        let grad = Tensor::from_slice(&lane_grad(rank * per_rank + lane)).view([5, 3]);
                        let done = sum.push(&layout, vec![Some(grad)]);
                        assert_eq!(done.is_some(), lane + 1 == per_rank);
                        if repeat == 1
                            && let Some(done) = done
                        {
                            return done.copy();
                        }
                    }
                }
                unreachable!()
            };
            let blocks = Tensor::cat(&(0..world_size).map(block).collect::<Vec<_>>(), 0);
            let root = sum_blocks(&blocks, world_size);
            let found: Vec<f32> = Vec::try_from(root).unwrap();
            assert_eq!(found[..15], expected[..], "world size {world_size}");
            assert!(found[15..].iter().all(|&v| v == 0.0));
        }
    }

    #[test]
    fn a_running_sum_takes_any_number_of_lanes() {
        let layout = BucketLayout::new(&OneTensor, 3);
        let mut sum = LaneSum::running(&layout, 3, Device::Cpu);
        let straight: Vec<f32> =
            (0..3).map(lane_grad).reduce(|a, b| a.iter().zip(b).map(|(a, b)| a + b).collect()).unwrap();
        for lane in (0..3).chain(0..3) {
            let done = sum.push(&layout, vec![Some(Tensor::from_slice(&lane_grad(lane)).view([5, 3]))]);
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
