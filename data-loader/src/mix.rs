//! How several sources share a lane's rows: which source each row of a lane comes from.
//!
//! A lane's rows are counted in blocks of fixed length. In its first `b` blocks a lane takes
//! `⌊b · block · S(i + 1)⌋ − ⌊b · block · S(i)⌋` rows of source `i`, where `S(i)` is the sum of the shares before `i`: never a whole row more
//! or less than its share, however long the run. Inside a block a keyed shuffle says whose turn it is. So the position
//! inside a source follows from the step, and nothing is carried along.

use crate::draws::{Key, Purpose, shuffle};

/// Shares are multiples of 2⁻³².
const WHOLE: u64 = 1 << 32;
/// Rows of a block, unless a small share needs more to have one row in it.
const SHORTEST_BLOCK: u64 = 256;
const LONGEST_BLOCK: u64 = 1 << 16;

/// Whose turn it is: a source, and how many turns it had in this block before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Turn {
    pub source: u32,
    pub ordinal: u32,
}

/// The shares of the sources of a mix.
#[derive(Clone, Debug)]
pub(crate) struct Shares {
    seed: u64,
    block: u64,
    /// Sum of the shares up to and including each source's, of [`WHOLE`].
    ends: Vec<u64>,
}

impl Shares {
    /// # Errors
    /// The number of a weight that is no positive number or too small a part of all, and why.
    pub fn new(seed: u64, weights: &[f64]) -> Result<Self, (usize, String)> {
        if let Some(at) = weights.iter().position(|weight| !(weight.is_finite() && *weight > 0.0)) {
            return Err((at, format!("is {}; expected a positive number", weights[at])));
        }
        // Relative to the largest, so that no sum overflows.
        let largest = weights.iter().copied().fold(0.0, f64::max);
        let total: f64 = weights.iter().map(|weight| weight / largest).sum();
        let mut sum = 0.0;
        let mut ends: Vec<u64> = Vec::with_capacity(weights.len());
        for weight in weights {
            sum += weight / largest;
            ends.push((sum / total * WHOLE as f64).round() as u64);
        }
        if let Some(last) = ends.last_mut() {
            *last = WHOLE;
        }
        let share = |at: usize| ends[at].saturating_sub(if at == 0 { 0 } else { ends[at - 1] });
        let smallest = (0..weights.len()).min_by_key(|&at| share(at)).unwrap_or_default();
        let needed = WHOLE.div_ceil(share(smallest).max(1)).next_power_of_two();
        if needed > LONGEST_BLOCK {
            let part = weights[smallest] / largest / total;
            return Err((
                smallest,
                format!("is {part:.1e} of all weights; expected a share of at least 1/{LONGEST_BLOCK}"),
            ));
        }
        Ok(Self { seed, block: needed.max(SHORTEST_BLOCK), ends })
    }

    /// Rows of a lane in one block.
    pub fn block(&self) -> u64 {
        self.block
    }

    /// Rows that a lane takes from `source` in its first `blocks` blocks.
    pub fn before(&self, source: usize, blocks: u64) -> u64 {
        let rows = u128::from(blocks) * u128::from(self.block);
        let up_to = |end: u64| (rows * u128::from(end) / u128::from(WHOLE)) as u64;
        up_to(self.ends[source]) - if source == 0 { 0 } else { up_to(self.ends[source - 1]) }
    }

    /// The turns of a lane's block, in its order.
    pub fn turns(&self, lane: usize, block: u64) -> Vec<Turn> {
        let mut turns = Vec::with_capacity(self.block as usize);
        for source in 0..self.ends.len() {
            let count = self.before(source, block + 1) - self.before(source, block);
            turns.extend((0..count).map(|_| Turn { source: source as u32, ordinal: 0 }));
        }
        shuffle(Key::new(self.seed, Purpose::Mix, block).lane(lane), &mut turns);
        count_turns(&mut turns, self.ends.len());
        turns
    }
}

/// Numbers each source's turns in the order in which they come.
pub(crate) fn count_turns(turns: &mut [Turn], sources: usize) {
    let mut had = vec![0; sources];
    for turn in turns {
        let had = &mut had[turn.source as usize];
        turn.ordinal = *had;
        *had += 1;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;
    use crate::properties::cases;

    proptest! {
        #![proptest_config(cases(64))]

        #[test]
        fn shares_are_exact_in_the_long_run_and_every_block_is_full(
            weights in prop::collection::vec(0.01..10.0f64, 1..6),
            seed in any::<u64>(),
            block in 0..1u64 << 40,
            lane in 0..65_536usize,
        ) {
            let shares = Shares::new(seed, &weights).unwrap();
            let total: f64 = weights.iter().sum();
            let turns = shares.turns(lane, block);
            prop_assert_eq!(turns.len() as u64, shares.block());
            for (source, weight) in weights.iter().enumerate() {
                let of_source: Vec<u32> = turns.iter().filter(|turn| turn.source == source as u32).map(|turn| turn.ordinal).collect();
                let count = shares.before(source, block + 1) - shares.before(source, block);
                prop_assert_eq!(of_source, (0..count as u32).collect::<Vec<_>>());
                let rows = (block * shares.block()) as f64;
                // Shares are rounded to 2⁻³².
                let off = (shares.before(source, block) as f64 - rows * weight / total).abs();
                prop_assert!(off <= 1.0 + rows * 2f64.powi(-31), "{} rows off after {}", off, rows);
            }
        }
    }

    #[test]
    fn the_turns_are_fixed_for_ever_and_differ_by_lane_and_block() {
        let shares = Shares::new(11, &[0.7, 0.2, 0.1]).unwrap();
        let first = |lane, block| shares.turns(lane, block)[..16].iter().map(|turn| turn.source).collect::<Vec<_>>();
        assert_eq!(shares.block(), 256);
        assert_eq!(first(0, 0), EXPECTED_TURNS);
        assert_ne!(first(1, 0), first(0, 0));
        assert_ne!(first(0, 1), first(0, 0));
    }

    const EXPECTED_TURNS: [u32; 16] = [0, 0, 0, 1, 1, 1, 0, 1, 1, 2, 0, 0, 0, 0, 0, 2];

    #[test]
    fn weights_that_give_no_share_are_refused_with_their_number() {
        for (weights, at, words) in [
            (&[1.0, 0.0][..], 1, "positive"),
            (&[f64::NAN, 1.0], 0, "positive"),
            (&[f64::INFINITY], 0, "positive"),
            (&[1.0, 2.0, 1e-7], 2, "1/65536"),
        ] {
            let (found, reason) = Shares::new(0, weights).unwrap_err();
            assert!(found == at && reason.contains(words), "{found} {reason}");
        }
        assert_eq!(Shares::new(0, &[1.0, 1e-4]).unwrap().block(), 16_384);
        assert_eq!(Shares::new(0, &[f64::MAX, f64::MAX]).unwrap().before(1, 3), 384);
    }
}
