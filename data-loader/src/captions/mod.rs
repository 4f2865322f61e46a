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

    /// Caption `which` of row `index` and its mask, at their own length.
    pub(crate) fn caption_into(&self, index: usize, which: usize, embeddings: &mut Vec<f32>, mask: &mut Vec<bool>) {
        let tokens = self.tokens(index, which);
        embeddings.resize(tokens * self.meta.dim, 0.0);
        mask.resize(tokens, false);
        self.caption(index, which, embeddings, mask);
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

    /// An error for each caption of `run` with a number that is not finite.
    pub(crate) fn bad_captions<'a>(
        &'a self,
        run: RowRun,
        block: &'a CaptionBlock,
    ) -> impl Iterator<Item = DataError> + 'a {
        let captions = (0..block.len()).flat_map(|index| (0..block.count(index)).map(move |which| (index, which)));
        let (mut numbers, mut mask) = (Vec::new(), Vec::new());
        captions.filter_map(move |(index, which)| {
            block.caption_into(index, which, &mut numbers, &mut mask);
            let at = numbers.iter().position(|number| !number.is_finite())?;
            let (token, at_token) = (at / block.dim(), at % block.dim());
            let found = format!("{} at position {at_token} of token {token} of caption {which}", numbers[at]);
            let row = run.first_row + index as u64;
            Some(self.row_error(row, &self.columns().caption, found, "finite numbers".into()))
        })
    }

    /// Refuses rows with more captions than there are weights.
    pub(crate) fn check_weights(
        &self,
        block: &CaptionBlock,
        runs: &[RowRun],
        weights: &[f64],
    ) -> Result<(), DataError> {
        let mut rows = runs.iter().flat_map(|run| run.first_row..run.first_row + run.rows).enumerate();
        let more = rows.find(|(index, _)| !weights.is_empty() && block.count(*index) > weights.len());
        more.map_or(Ok(()), |(index, row)| {
            let (found, expected) = (block.count(index), weights.len());
            let expected = format!("at most {expected}, as many as `data.caption_weights` has");
            Err(self.row_error(row, &self.columns().caption, format!("{found} captions"), expected))
        })
    }

    pub(crate) fn no_captions(&self) -> DataError {
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
                let decoded = decode::captions(array, layout);
                let decoded = decoded.and_then(|decoded| decode::check_counts(&decoded.1, layout).map(|()| decoded));
                let (numbers, captions) = decoded.map_err(|error| bad(error, &column.name))?;
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

/// What captions micro-batches bring.
#[derive(Clone, Debug, PartialEq)]
pub struct CaptionOptions {
    /// Tokens that they are padded or cut to, at least 1; see [`LatentDataset::caption_tokens`].
    pub tokens: usize,
    /// How often each of a row's captions is taken; empty: all equally often. A row with fewer captions goes by the weights of those
    /// that it has, or by none if these are 0.
    pub weights: Vec<f64>,
}

/// Refuses captions that data sets cannot give.
pub(crate) fn check_options(options: &CaptionOptions, datasets: &[&LatentDataset]) -> Result<(), DataError> {
    let CaptionOptions { tokens, weights } = options;
    let mut metas = Vec::with_capacity(datasets.len());
    for dataset in datasets {
        metas.push(dataset.meta().captions.ok_or_else(|| dataset.no_captions())?);
    }
    let most = metas.iter().try_fold(0, |most, meta| Some(meta.per_row?.max(most)));
    let total: f64 = weights.iter().sum();
    let bad = weights.iter().any(|weight| weight.is_nan() || *weight < 0.0) || !total.is_finite();
    for (dataset, meta) in datasets.iter().zip(&metas) {
        let refuse = |reason: String| Err(DataError::Request { url: dataset.name().to_owned(), reason });
        if *tokens == 0 || meta.dim != metas[0].dim {
            let (dim, of_first) = (meta.dim, metas[0].dim);
            return refuse(format!(
                "captions of {tokens} tokens of {of_first} numbers are asked for; here tokens have {dim}"
            ));
        }
        if bad || (!weights.is_empty() && total == 0.0) {
            return refuse(format!("captions are weighed by {weights:?}; expected numbers from 0 on, one above"));
        }
        let captions = meta.per_row.filter(|captions| *captions > weights.len()).or(most);
        if let Some(captions) = captions.filter(|captions| !weights.is_empty() && *captions != weights.len()) {
            let given = weights.len();
            return refuse(format!(
                "rows have {captions} captions, but `data.caption_weights` has {given}; give each a weight, 0 to leave it out"
            ));
        }
    }
    Ok(())
}

/// Which of a row's captions is taken. One draw a row, also where it has but one caption, so that no row's choice depends on how
/// many the others have.
pub(crate) fn choose(choices: &mut impl Rng, weights: &[f64], captions: usize) -> usize {
    let draw = choices.next_u64();
    let weights = &weights[..captions.min(weights.len())];
    let total: f64 = weights.iter().sum();
    let Some(last) = weights.iter().rposition(|weight| *weight > 0.0) else {
        // The upper half of the product: below `captions`, and even up to captions / 2^64.
        return ((u128::from(draw) * captions as u128) >> 64) as usize;
    };
    // 53 bits are what an f64 below 1 holds.
    let mut left = (draw >> 11) as f64 / (1u64 << 53) as f64 * total;
    let taken = weights.iter().position(|weight| {
        left -= weight;
        left < 0.0
    });
    // Rounding may leave a rest.
    taken.unwrap_or(last)
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

#[cfg(test)]
mod tests;
