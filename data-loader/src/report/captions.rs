//! What is told of captions.

use serde::Serialize;

use crate::{CaptionBlock, LatentDataset};

/// The captions of a data set; numbers of rows and tokens are those of the rows that were read.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CaptionSummary {
    /// Their columns.
    pub columns: Vec<String>,
    /// Numbers of a token.
    pub dim: usize,
    /// Stored number type.
    pub dtype: String,
    /// Whether masks are stored.
    pub masked: bool,
    /// From the metadata or the types: most tokens of a caption.
    pub most_tokens: Option<usize>,
    /// Captions that were read.
    pub captions: u64,
    /// Captions of a row.
    pub of_row: Option<CountRange>,
    /// Tokens of a caption.
    pub tokens: Option<CountRange>,
    /// Tokens of a caption that its mask lets through; all where there is none.
    pub tokens_that_count: Option<CountRange>,
    /// Numbers that are NaN or infinite.
    pub non_finite: u64,
}

/// Least, mean and most of a number.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CountRange {
    /// The least.
    pub min: u64,
    /// The mean.
    pub mean: f64,
    /// The most.
    pub max: u64,
}

/// What is counted over captions.
#[derive(Clone, Default)]
pub(super) struct CaptionTally {
    of_row: Count,
    tokens: Count,
    that_count: Count,
    non_finite: u64,
}

#[derive(Clone, Default)]
struct Count {
    count: u64,
    sum: u64,
    min: Option<u64>,
    max: u64,
}

impl Count {
    fn add(&mut self, number: usize) {
        let number = number as u64;
        self.join(&Self { count: 1, sum: number, min: Some(number), max: number });
    }

    fn join(&mut self, other: &Self) {
        self.count += other.count;
        self.sum += other.sum;
        self.min = self.min.into_iter().chain(other.min).min();
        self.max = self.max.max(other.max);
    }

    fn range(&self) -> Option<CountRange> {
        self.min.map(|min| CountRange { min, mean: self.sum as f64 / self.count as f64, max: self.max })
    }
}

impl CaptionTally {
    pub fn of(block: &CaptionBlock) -> Self {
        let mut tally = Self::default();
        let (mut numbers, mut mask) = (Vec::new(), Vec::new());
        for index in 0..block.len() {
            tally.of_row.add(block.count(index));
            for which in 0..block.count(index) {
                block.caption_into(index, which, &mut numbers, &mut mask);
                tally.tokens.add(mask.len());
                tally.that_count.add(mask.iter().filter(|counts| **counts).count());
                tally.non_finite += numbers.iter().filter(|number| !number.is_finite()).count() as u64;
            }
        }
        tally
    }

    pub fn join(&mut self, other: &Self) {
        self.of_row.join(&other.of_row);
        self.tokens.join(&other.tokens);
        self.that_count.join(&other.that_count);
        self.non_finite += other.non_finite;
    }

    /// `None` where a data set has no captions.
    pub fn summary(&self, dataset: &LatentDataset) -> Option<CaptionSummary> {
        let layout = dataset.captions.as_ref()?;
        Some(CaptionSummary {
            columns: layout.columns.iter().map(|column| column.name.clone()).collect(),
            dim: layout.meta.dim,
            dtype: layout.meta.dtype.to_string(),
            masked: layout.meta.masked,
            most_tokens: layout.meta.most_tokens,
            captions: self.tokens.count,
            of_row: self.of_row.range(),
            tokens: self.tokens.range(),
            tokens_that_count: self.that_count.range(),
            non_finite: self.non_finite,
        })
    }
}
