//! Lanes to ranks: an experiment has `lanes` logical workers, a rank executes a contiguous, aligned block of them.
//!
//! With [`Reduction::Invariant`], `lanes` and `world_size` are powers of two, so a rank's block is exactly one node of the
//! canonical reduction tree. [`Reduction::Fast`] asks only that ranks have equally many lanes.

use crate::Reduction;

/// The most lanes an experiment may have.
pub const MAX_LANES: usize = 65_536;

/// The lanes `[first, first + len)` that one rank executes, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneBlock {
    /// First lane of the block; a multiple of `len`.
    pub first: usize,
    /// Lanes in the block; a power of two unless the reduction is fast.
    pub len: usize,
}

/// Why a rank cannot be given lanes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// `lanes` is not a power of two (which only [`Reduction::Fast`] does not need) or above [`MAX_LANES`].
    #[error(
        "lanes = {lanes} is not a power of two from 1 to {MAX_LANES}; only reduction = \"fast\" takes other numbers up to that"
    )]
    Lanes {
        /// The lanes asked for.
        lanes: usize,
    },
    /// `world_size` does not divide the lanes into equal blocks.
    #[error("world_size = {world_size} cannot share {lanes} lanes evenly; allowed are {}", join(&world_sizes(*reduction, *lanes)))]
    WorldSize {
        /// How sums over lanes are made.
        reduction: Reduction,
        /// The ranks asked for.
        world_size: usize,
        /// The lanes of the experiment.
        lanes: usize,
    },
    /// There is no such rank.
    #[error("rank {rank} does not exist in a world of {world_size} ranks (0 to {})", world_size.saturating_sub(1))]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// Ranks in the world.
        world_size: usize,
    },
}

impl LaneBlock {
    /// The block of `rank` when `world_size` ranks share `lanes` lanes and sum along the canonical tree.
    ///
    /// # Errors
    /// As [`LaneBlock::under`].
    pub fn of(rank: usize, world_size: usize, lanes: usize) -> Result<LaneBlock, LaneError> {
        Self::under(Reduction::Invariant, rank, world_size, lanes)
    }

    /// The block of `rank` when `world_size` ranks share `lanes` lanes.
    ///
    /// # Errors
    /// A number of lanes that `reduction` cannot sum, `world_size` not one of [`world_sizes`], or `rank >= world_size`.
    pub fn under(reduction: Reduction, rank: usize, world_size: usize, lanes: usize) -> Result<LaneBlock, LaneError> {
        let can_sum = reduction == Reduction::Fast || lanes.is_power_of_two();
        if !can_sum || !(1..=MAX_LANES).contains(&lanes) {
            return Err(LaneError::Lanes { lanes });
        }
        // A power of two has no other divisors.
        if world_size == 0 || !lanes.is_multiple_of(world_size) {
            return Err(LaneError::WorldSize { reduction, world_size, lanes });
        }
        if rank >= world_size {
            return Err(LaneError::Rank { rank, world_size });
        }
        let len = lanes / world_size;
        Ok(LaneBlock { first: rank * len, len })
    }

    /// The lanes of the block in the order in which the rank executes them.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.first..self.first + self.len
    }
}

/// World sizes that `lanes` lanes can be spread over when they are summed along the canonical tree, ascending; empty if
/// `lanes` is not a power of two.
pub fn allowed_world_sizes(lanes: usize) -> Vec<usize> {
    world_sizes(Reduction::Invariant, lanes)
}

/// World sizes that `lanes` lanes can be spread over, ascending: their divisors. Empty where `reduction` cannot sum that many.
pub fn world_sizes(reduction: Reduction, lanes: usize) -> Vec<usize> {
    (1..=lanes.min(MAX_LANES)).filter(|world_size| LaneBlock::under(reduction, 0, *world_size, lanes).is_ok()).collect()
}

fn join(sizes: &[usize]) -> String {
    sizes.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn blocks_partition_the_lanes_in_order() {
        for (reduction, lanes) in [1, 2, 4, 8, 256]
            .map(|lanes| (Reduction::Invariant, lanes))
            .into_iter()
            .chain([8, 12, 7].map(|lanes| (Reduction::Fast, lanes)))
        {
            for world_size in world_sizes(reduction, lanes) {
                let block = |rank| LaneBlock::under(reduction, rank, world_size, lanes).unwrap();
                let dealt: Vec<usize> = (0..world_size).flat_map(|rank| block(rank).range()).collect();
                assert_eq!(dealt, (0..lanes).collect::<Vec<_>>(), "{lanes} lanes on {world_size} ranks");
            }
        }
    }

    #[test]
    fn world_sizes_are_the_powers_of_two_up_to_the_lanes() {
        assert_eq!(allowed_world_sizes(8), [1, 2, 4, 8]);
        assert_eq!(allowed_world_sizes(1), [1]);
        assert_eq!(allowed_world_sizes(12), [0usize; 0]);
        assert_eq!(allowed_world_sizes(0), [0usize; 0]);
    }

    #[test]
    fn fast_sums_take_every_divisor_of_the_lanes() {
        assert_eq!(world_sizes(Reduction::Fast, 12), [1, 2, 3, 4, 6, 12]);
        assert_eq!(world_sizes(Reduction::Fast, 8), allowed_world_sizes(8));
        assert_eq!(world_sizes(Reduction::Fast, 0), [0usize; 0]);
        let message = LaneBlock::under(Reduction::Fast, 0, 5, 12).unwrap_err().to_string();
        assert!(message.contains("allowed are 1, 2, 3, 4, 6, 12"), "{message}");
    }

    #[test]
    fn impossible_shares_are_refused_with_the_allowed_sizes() {
        let refused = |world_size| LaneError::WorldSize { reduction: Reduction::Invariant, world_size, lanes: 4 };
        assert_eq!(LaneBlock::of(0, 1, 12), Err(LaneError::Lanes { lanes: 12 }));
        assert_eq!(LaneBlock::of(2, 2, 4), Err(LaneError::Rank { rank: 2, world_size: 2 }));
        assert_eq!(LaneBlock::of(0, 0, 4), Err(refused(0)));
        assert_eq!(LaneBlock::of(0, 8, 4), Err(refused(8)));
        let message = LaneBlock::of(0, 3, 4).unwrap_err().to_string();
        assert!(message.contains('3') && message.contains("1, 2, 4"), "{message}");
    }
}
