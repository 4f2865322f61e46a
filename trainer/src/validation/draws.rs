//! The fixed draws of a validation: which rows, and at which times with which noise they are judged.

use configs::ValidationConfig;
use data_loader::draws::{Key, Purpose, fill_normal, shuffle};
use std::ops::Range;

/// `wanted` rows (all, if there are fewer) of a data set of `rows`, evenly spaced: a set that is sorted by class gives
/// all classes.
pub fn spread_rows(rows: u64, wanted: usize) -> Vec<u64> {
    let count = rows.min(wanted as u64);
    let at = |i: u64| (u128::from(i) * u128::from(rows) / u128::from(count)) as u64;
    (0..count).map(at).collect()
}

/// The draws of a validation, numbered row by row. Each is a pure function of seed, row number and its place in the
/// list: not of the step, the ranks, the batches, or the order of asking.
#[derive(Clone, Debug)]
pub struct Draws {
    rows: Vec<u64>,
    per_row: usize,
    bins: usize,
    seed: u64,
}

impl Draws {
    /// For a data set of `rows` rows.
    pub fn new(rows: u64, config: &ValidationConfig) -> Self {
        let ValidationConfig { draws, bins, seed, .. } = *config;
        Self { rows: spread_rows(rows, config.rows), per_row: draws, bins, seed }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.rows.len() * self.per_row
    }

    /// The data set rows of `draws`, each once, in order.
    pub fn rows(&self, draws: &Range<usize>) -> &[u64] {
        &self.rows[draws.start / self.per_row..draws.end.div_ceil(self.per_row)]
    }

    /// The place of a draw's row in [`Draws::rows`] of a range that starts at `first`.
    pub fn row_index(&self, draw: usize, first: usize) -> usize {
        draw / self.per_row - first / self.per_row
    }

    /// The time bin of every draw. Each block of as many draws as there are bins has one of each, in an order of its
    /// own, so that no pattern in the rows meets one in the times.
    pub fn bins(&self) -> Vec<usize> {
        let mut bins = Vec::with_capacity(self.count() + self.bins);
        for block in 0..self.count().div_ceil(self.bins) {
            let mut order: Vec<usize> = (0..self.bins).collect();
            shuffle(Key::new(self.seed, Purpose::ValidationTimestep, block as u64).lane(1), &mut order);
            bins.extend(order);
        }
        bins.truncate(self.count());
        bins
    }

    /// The time of a draw in `bin`, as the share of the way from data to noise, in [0, 1).
    pub fn time(&self, draw: usize, bin: usize) -> f64 {
        use rand::Rng;
        let bits = self.key(Purpose::ValidationTimestep, draw).rng().next_u64() >> 11;
        let inside = bits as f64 / (1u64 << 53) as f64;
        // Rounding may carry the sum up to the next bin's start.
        let time = (bin as f64 + inside) / self.bins as f64;
        time.min(((bin + 1) as f64 / self.bins as f64).next_down())
    }

    /// The noise of a draw.
    pub fn noise(&self, draw: usize, out: &mut [f32]) {
        fill_normal(self.key(Purpose::ValidationNoise, draw), out);
    }

    fn key(&self, purpose: Purpose, draw: usize) -> Key {
        let row = self.rows[draw / self.per_row];
        Key::new(self.seed, purpose, row).index((draw % self.per_row) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(rows: usize, per_row: usize, bins: usize) -> Draws {
        let config =
            ValidationConfig { rows, draws: per_row, bins, seed: 7, ..ValidationConfig::of("memory:///".to_owned()) };
        Draws::new(1000, &config)
    }

    #[test]
    fn rows_are_spread_over_the_whole_set() {
        assert_eq!(spread_rows(10, 4), [0, 2, 5, 7]);
        assert_eq!(spread_rows(3, 10), [0, 1, 2]);
        let rows = spread_rows(u64::MAX / 2, 1000);
        assert!(rows.windows(2).all(|pair| pair[0] < pair[1]) && rows[999] > u64::MAX / 2 / 1000 * 998);
    }

    #[test]
    fn every_bin_has_equally_many_draws_and_every_draw_lies_in_its_bin() {
        let draws = draws(70, 2, 7);
        let bins = draws.bins();
        assert_eq!(bins.len(), 140);
        for bin in 0..7 {
            assert_eq!(bins.iter().filter(|found| **found == bin).count(), 20);
        }
        let times: Vec<f64> = bins.iter().enumerate().map(|(draw, &bin)| draws.time(draw, bin)).collect();
        assert!(times.iter().zip(&bins).all(|(time, &bin)| (time * 7.0).floor() as usize == bin), "{times:?}");
        // The blocks' orders differ, and so do the places inside the bins.
        assert!(bins.chunks(7).any(|block| block != &bins[..7]));
        let inside: Vec<u64> = times.iter().map(|time| (time * 7.0).fract().to_bits()).collect();
        assert_eq!(inside.iter().collect::<std::collections::BTreeSet<_>>().len(), 140);
    }

    #[test]
    fn a_draw_is_a_function_of_row_and_number_whatever_else_is_judged() {
        let (few, many) = (draws(10, 1, 5), draws(1000, 3, 5));
        let noise = |draws: &Draws, draw| {
            let mut noise = [0f32; 4];
            draws.noise(draw, &mut noise);
            noise
        };
        // Row 300 is the fourth of ten and has the first of three draws at 900.
        assert_eq!(few.rows(&(3..4)), [300]);
        assert_eq!(noise(&few, 3), noise(&many, 900));
        assert_eq!(few.time(3, 2), many.time(900, 2));
        assert_ne!(noise(&many, 900), noise(&many, 901));
        assert_ne!(noise(&many, 900), noise(&many, 903));
        assert_ne!(many.time(900, 2), many.time(901, 2));
    }

    #[test]
    fn a_range_of_draws_knows_its_rows() {
        let draws = draws(10, 3, 5);
        assert_eq!(draws.count(), 30);
        assert_eq!(draws.rows(&(5..10)), [100, 200, 300]);
        assert_eq!([5, 6, 8, 9].map(|draw| draws.row_index(draw, 5)), [0, 1, 1, 2]);
    }
}
