//! Lanes to ranks: an experiment has `lanes` logical workers, a rank executes a contiguous, aligned block of them.
//!
//! `lanes` and `world_size` are powers of two, so a rank's block is exactly one node of the canonical reduction tree.

/// The most lanes an experiment may have.
pub const MAX_LANES: usize = 65_536;

/// The lanes `[first, first + len)` that one rank executes, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneBlock {
    /// First lane of the block; a multiple of `len`.
    pub first: usize,
    /// Lanes in the block; a power of two.
    pub len: usize,
}

/// Why a rank cannot be given lanes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaneError {
    /// `lanes` is not a power of two up to [`MAX_LANES`].
    #[error("lanes = {lanes} is not a power of two from 1 to {MAX_LANES}")]
    Lanes {
        /// The lanes asked for.
        lanes: usize,
    },
    /// `world_size` does not divide the lanes into aligned blocks.
    #[error("world_size = {world_size} cannot share {lanes} lanes evenly; allowed are {}", join(&allowed_world_sizes(*lanes)))]
    WorldSize {
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
    /// The block of `rank` when `world_size` ranks share `lanes` lanes.
    ///
    /// # Errors
    /// `lanes` not a power of two, `world_size` not one of [`allowed_world_sizes`], or `rank >= world_size`.
    pub fn of(rank: usize, world_size: usize, lanes: usize) -> Result<LaneBlock, LaneError> {
        if !lanes.is_power_of_two() || lanes > MAX_LANES {
            return Err(LaneError::Lanes { lanes });
        }
        if !world_size.is_power_of_two() || world_size > lanes {
            return Err(LaneError::WorldSize { world_size, lanes });
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

/// World sizes that `lanes` lanes can be spread over, ascending; empty if `lanes` is not a power of two.
pub fn allowed_world_sizes(lanes: usize) -> Vec<usize> {
    if !lanes.is_power_of_two() {
        return Vec::new();
    }
    (0..=lanes.trailing_zeros()).map(|k| 1 << k).collect()
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
        for lanes in [1, 2, 4, 8, 256] {
            for world_size in allowed_world_sizes(lanes) {
                let dealt: Vec<usize> =
                    (0..world_size).flat_map(|rank| LaneBlock::of(rank, world_size, lanes).unwrap().range()).collect();
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
    fn impossible_shares_are_refused_with_the_allowed_sizes() {
        assert_eq!(LaneBlock::of(0, 1, 12), Err(LaneError::Lanes { lanes: 12 }));
        assert_eq!(LaneBlock::of(2, 2, 4), Err(LaneError::Rank { rank: 2, world_size: 2 }));
        assert_eq!(LaneBlock::of(0, 0, 4), Err(LaneError::WorldSize { world_size: 0, lanes: 4 }));
        assert_eq!(LaneBlock::of(0, 8, 4), Err(LaneError::WorldSize { world_size: 8, lanes: 4 }));
        let message = LaneBlock::of(0, 3, 4).unwrap_err().to_string();
        assert!(message.contains('3') && message.contains("1, 2, 4"), "{message}");
    }
}
