//! Caption embeddings: tokens × dim, of differing length, several of a row.

mod decode;
mod layout;

use arrow::buffer::BooleanBuffer;
use rand::Rng;

use crate::{DataError, LatentDataset, RowRun};

use crate::decode::Flat;

pub use layout::CaptionMeta;
pub(crate) use layout::{CaptionColumns, CaptionLayout, find};

/// The captions of rows, in the precision in which they are stored.
#[derive(Clone, Debug)]
pub struct CaptionBlock {
    meta: CaptionMeta,
    /// Shares the memory of what was decoded.
    parts: Vec<Part>,
    /// Of each row.
    captions: Vec<Vec<Span>>,
}

/// A decoded column of a batch.
#[derive(Clone, Debug)]
struct Part {
    numbers: Flat,
    mask: Option<BooleanBuffer>,
}

/// A caption.
#[derive(Clone, Copy, Debug)]
struct Span {
    part: usize,
    first_token: usize,
    tokens: usize,
}

impl CaptionBlock {
    /// Numbers of a token.
    pub fn dim(&self) -> usize {
        self.meta.dim
    }

    /// Rows in the block.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Whether the block has no row.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty()
    }

    /// How many captions row `index` has; at least one.
    pub fn count(&self, index: usize) -> usize {
        self.captions[index].len()
    }

    /// How many tokens caption `which` of row `index` has; at least one.
    pub fn tokens(&self, index: usize, which: usize) -> usize {
        self.captions[index][which].tokens
    }

    /// Writes caption `which` of row `index` to `embeddings` `[tokens, dim]` and `mask` `[tokens]`: cut where it has more tokens,
    /// else followed by zeros that the mask leaves out.
    ///
    /// # Panics
    /// If an index is out of range, or `embeddings` is not `dim` times as long as `mask`.
    pub fn caption(&self, index: usize, which: usize, embeddings: &mut [f32], mask: &mut [bool]) {
        assert_eq!(embeddings.len(), mask.len() * self.meta.dim, "one mask entry per token");
        let Span { part, first_token, tokens } = self.captions[index][which];
        let (part, tokens) = (&self.parts[part], tokens.min(mask.len()));
        let (numbers, padding) = embeddings.split_at_mut(tokens * self.meta.dim);
        part.numbers.widen(self.meta.dtype, first_token * self.meta.dim, numbers);
        padding.fill(0.0);
        for (token, mask) in mask.iter_mut().enumerate() {
            *mask = token < tokens && part.mask.as_ref().is_none_or(|stored| stored.value(first_token + token));
        }
    }
}

impl LatentDataset {
    /// How many tokens captions are padded or cut to: the configured number, else the most that the metadata tells.
    ///
    /// # Errors
    /// If there are no captions, or neither says it.
    pub fn caption_tokens(&self, configured: Option<usize>) -> Result<usize, DataError> {
        let found = self.meta().captions.ok_or_else(|| self.no_captions())?;
        configured.or(found.most_tokens).ok_or_else(|| DataError::Request {
            url: self.name().to_owned(),
            reason: "captions are lists of any length, and nothing says how many tokens to take; write `ditharos.caption_shape`, or give the number".into(),
        })
    }

    fn no_captions(&self) -> DataError {
        let name = &self.columns().caption;
        let reason =
            format!("there are no captions: no column `{name}` or `{name}_1`; name it as `data.columns.caption`");
        DataError::Request { url: self.name().to_owned(), reason }
    }

    /// Reads the captions of rows, in the order of `runs`, which must not overlap.
    ///
    /// # Errors
    /// If there are none, a row does not exist or cannot be read, or a caption is null, empty, of other numbers to a token, or its
    /// mask is of another length or all false.
    pub fn read_captions(&self, runs: &[RowRun]) -> Result<CaptionBlock, DataError> {
        self.io.block_on(self.caption_runs(runs))
    }

    pub(crate) async fn caption_runs(&self, runs: &[RowRun]) -> Result<CaptionBlock, DataError> {
        let Some(layout) = &self.captions else {
            return Err(self.no_captions());
        };
        let names = layout.columns.iter().flat_map(|column| [Some(&column.name), column.mask.as_ref()]).flatten();
        let names: Vec<&str> = names.map(String::as_str).collect();
        let mut block = CaptionBlock { meta: layout.meta, parts: Vec::new(), captions: Vec::new() };
        let rows: u64 = runs.iter().map(|run| run.rows).sum();
        block.captions.resize(rows as usize, Vec::new());
        self.each_batch(runs, &names, |at, batch, rows| {
            for column in &layout.columns {
                let bad = |bad: crate::decode::BadRow, name: &str| {
                    self.row_error(rows[bad.row].1, name, bad.found, bad.expected)
                };
                let array = self.column(at, batch, &column.name)?;
                let (numbers, captions) = decode::captions(array, layout).map_err(|error| bad(error, &column.name))?;
                let mask = match &column.mask {
                    None => None,
                    Some(name) => {
                        let array = self.column(at, batch, name)?;
                        Some(decode::mask(array, &captions, layout.nesting).map_err(|error| bad(error, name))?)
                    }
                };
                let (part, mut first_token) = (block.parts.len(), 0);
                for (row, tokens) in captions {
                    block.captions[rows[row].0].push(Span { part, first_token, tokens });
                    first_token += tokens;
                }
                block.parts.push(Part { numbers, mask });
            }
            Ok(())
        })
        .await?;
        Ok(block)
    }
}

/// Which of a row's captions is taken: each equally often. One draw a row, also where it has but one caption, so that no row's
/// choice depends on how many the others have.
pub(crate) fn choose(choices: &mut impl Rng, captions: usize) -> usize {
    // The upper half of the product: below `captions`, and even up to captions / 2^64.
    ((u128::from(choices.next_u64()) * captions as u128) >> 64) as usize
}

/// The chosen captions of a micro-batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CaptionBatch {
    /// Tokens of each, padding included.
    pub tokens: usize,
    /// Numbers of a token.
    pub dim: usize,
    /// `[micro_batch, tokens, dim]`; zero where the mask is false at the end.
    pub embeddings: Vec<f32>,
    /// `[micro_batch, tokens]`: which tokens count.
    pub mask: Vec<bool>,
}

impl CaptionBatch {
    /// Empties it for captions of so many tokens.
    pub(crate) fn emptied(mut self, tokens: usize, dim: usize) -> Self {
        self.embeddings.clear();
        self.mask.clear();
        Self { tokens, dim, ..self }
    }

    /// Appends caption `which` of row `index`.
    pub(crate) fn push(&mut self, block: &CaptionBlock, index: usize, which: usize) {
        let (numbers, tokens) = (self.embeddings.len(), self.mask.len());
        self.embeddings.resize(numbers + self.tokens * self.dim, 0.0);
        self.mask.resize(tokens + self.tokens, false);
        block.caption(index, which, &mut self.embeddings[numbers..], &mut self.mask[tokens..]);
    }
}
