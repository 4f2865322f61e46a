//! Rows spread over a data set, and how fast they are read.

use std::time::Instant;

use serde::Serialize;

use crate::read::Want;
use crate::{DataError, LatentDataset, RowBlock, RowRun};

/// Places in the data set that a sample is read from.
const PLACES: u64 = 64;
/// Rows read at a place, at most.
const ROWS_AT_PLACE: u64 = 256;
/// Bytes of latents in a sample, about.
const SAMPLE_BYTES: u64 = 256 << 20;

/// How fast a sample was read.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ReadSpeed {
    /// Rows of the sample.
    pub rows: u64,
    /// Time that reading and decoding it took.
    pub seconds: f64,
    /// Rows a second.
    pub rows_per_s: f64,
    /// Passes over the data set a second at that speed.
    pub epochs_per_s: f64,
}

impl LatentDataset {
    /// At most `count` rows, evenly spread over the data set, ascending.
    pub fn spread_rows(&self, count: u64) -> Vec<u64> {
        let rows = self.meta().rows;
        let count = count.min(rows);
        (0..count).map(|i| (u128::from(i) * u128::from(rows) / u128::from(count)) as u64).collect()
    }

    /// Runs of rows, spread over the data set, of about [`SAMPLE_BYTES`] in all; the whole data set if that is no more.
    pub(crate) fn sample_runs(&self) -> Vec<RowRun> {
        let rows = self.meta().rows;
        let row_bytes = self.files.iter().map(|footer| footer.file.file_bytes).sum::<u64>().div_ceil(rows).max(1);
        let wanted = (SAMPLE_BYTES / row_bytes).clamp(1, PLACES * ROWS_AT_PLACE);
        if wanted >= rows {
            return vec![RowRun { first_row: 0, rows }];
        }
        let places = wanted.min(PLACES);
        let starts = self.spread_rows(places);
        let ends = starts.iter().skip(1).copied().chain([rows]);
        let runs = starts.iter().zip(ends);
        runs.map(|(&first_row, end)| RowRun { first_row, rows: (wanted / places).min(end - first_row) }).collect()
    }

    /// Reads rows from all over the data set and takes the time: one thread, place by place, as a rank of a training run reads
    /// ranges of rows. What the operating system holds in memory already comes from there.
    ///
    /// # Errors
    /// If a row cannot be read.
    pub(crate) fn timed_sample(&self) -> Result<(Vec<RowBlock>, ReadSpeed), DataError> {
        // Where rows have shapes of their own, the first read finds them all.
        self.row_shapes()?;
        let runs = self.sample_runs();
        let start = Instant::now();
        let blocks = runs
            .iter()
            .map(|run| self.io.block_on(self.read_runs(&[*run], Want::All)))
            .collect::<Result<Vec<_>, _>>()?;
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        let rows: u64 = runs.iter().map(|run| run.rows).sum();
        let rows_per_s = rows as f64 / seconds;
        Ok((blocks, ReadSpeed { rows, seconds, rows_per_s, epochs_per_s: rows_per_s / self.meta().rows as f64 }))
    }
}
