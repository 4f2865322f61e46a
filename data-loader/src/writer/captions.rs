//! Columns of captions: lists of tokens, or bytes of bf16, of which parquet has no list.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BinaryArray, BooleanArray, ListArray};
use arrow::buffer::{BooleanBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, FieldRef};

use super::layout::{latent_item, little_endian, numbers_array};
use crate::block::Numbers;
use crate::form::shape_numel;
use crate::{CaptionMeta, Columns, Dtype};

/// Most captions of a row that get columns of their own.
const MOST_COLUMNS: usize = 1000;

/// A caption of a [`super::Row`].
#[derive(Clone, Copy, Debug)]
pub struct Caption<'a> {
    /// Embeddings `[tokens, dim]` in C order, at least one token.
    pub embeddings: &'a [f32],
    /// Which tokens count `[tokens]`, at least one; `None`: all. Only where masks are stored.
    pub mask: Option<&'a [bool]>,
}

impl CaptionMeta {
    /// The words of what makes no sense in a file that is written.
    pub(super) fn check(&self) -> Result<(), String> {
        let least = [self.per_row.unwrap_or(1), self.most_tokens.unwrap_or(1), self.dim];
        if shape_numel(&least).is_none() {
            return Err(format!("captions of shape {}; expected positive lengths, at most 2^28 numbers", self.shape()));
        }
        if let Some(columns) = self.per_row.filter(|columns| *columns > MOST_COLUMNS) {
            return Err(format!("{columns} captions of every row; expected at most {MOST_COLUMNS}"));
        }
        if self.dtype == Dtype::Bf16 && self.per_row.is_none() {
            return Err(
                "captions in bf16, as many of a row as there are; store the same number of every row, or f32".into()
            );
        }
        Ok(())
    }

    /// `ditharos.caption_shape` of the columns that are written.
    pub(super) fn shape(&self) -> String {
        let dim = |dim: Option<usize>| dim.map_or("null".to_owned(), |dim| dim.to_string());
        match self.per_row {
            // A column holds one.
            Some(_) => format!("[{},{}]", dim(self.most_tokens), self.dim),
            None => format!("[null,{},{}]", dim(self.most_tokens), self.dim),
        }
    }

    /// The columns of captions, and those of their masks.
    pub(super) fn fields(&self) -> Vec<Field> {
        let names = Columns::default();
        let several = self.per_row.is_none();
        let of = |name: &str, data_type: &DataType| -> Vec<Field> {
            let named = |name: String| Field::new(name, data_type.clone(), false);
            match self.per_row {
                None | Some(1) => vec![named(name.to_owned())],
                Some(columns) => (1..=columns).map(|number| named(format!("{name}_{number}"))).collect(),
            }
        };
        let nested = |inner: DataType| if several { list(inner) } else { inner };
        let token = DataType::List(latent_item(self.dtype));
        let captions = if self.dtype == Dtype::Bf16 { DataType::Binary } else { nested(list(token)) };
        let mut fields = of(&names.caption, &captions);
        if self.masked {
            fields.extend(of(&names.caption_mask, &nested(list(DataType::Boolean))));
        }
        fields
    }

    /// Refuses captions of a row that cannot be written, with the words for a message.
    pub(crate) fn check_row(&self, captions: &[Caption<'_>]) -> Result<(), String> {
        let expected = self.per_row.unwrap_or(captions.len().max(1));
        if captions.len() != expected {
            return Err(format!("has {} captions; expected {expected}", captions.len()));
        }
        let mut numel = 0usize;
        for (which, Caption { embeddings, mask }) in captions.iter().enumerate() {
            let tokens = embeddings.len() / self.dim;
            if tokens == 0 || tokens * self.dim != embeddings.len() {
                let found = embeddings.len();
                return Err(format!("caption {which} has {found} numbers; expected tokens of {}", self.dim));
            }
            if let Some(most) = self.most_tokens.filter(|most| tokens > *most) {
                return Err(format!("caption {which} has {tokens} tokens; expected at most {most}"));
            }
            if let Some(at) = embeddings.iter().position(|number| !self.dtype.holds(*number)) {
                let (number, dtype) = (embeddings[at], self.dtype);
                return Err(format!("caption {which} holds {number} at position {at}, which {dtype} cannot hold"));
            }
            match mask {
                Some(_) if !self.masked => {
                    return Err(format!("caption {which} has a mask, but the file has no column for it"));
                }
                Some(mask) if mask.len() != tokens || !mask.contains(&true) => {
                    return Err(format!(
                        "caption {which} has a mask of {}, {} of them true; expected {tokens}, one of them true at least",
                        mask.len(),
                        mask.iter().filter(|counts| **counts).count()
                    ));
                }
                _ => {}
            }
            numel = numel.saturating_add(embeddings.len());
        }
        match shape_numel(&[numel]) {
            Some(_) => Ok(()),
            None => Err(format!("has captions of {numel} numbers; expected at most 2^28")),
        }
    }
}

/// Captions that wait to be handed over.
pub(super) struct WaitingCaptions {
    meta: CaptionMeta,
    columns: Vec<Column>,
}

struct Column {
    numbers: Numbers,
    /// Which tokens count, of all captions.
    mask: Vec<bool>,
    /// Tokens of each caption.
    tokens: Vec<usize>,
    /// Captions of each row.
    counts: Vec<usize>,
}

impl WaitingCaptions {
    pub fn new(meta: CaptionMeta) -> Self {
        let column = |_| {
            let numbers = Numbers::zeros(meta.dtype, 0);
            Column { numbers, mask: Vec::new(), tokens: Vec::new(), counts: Vec::new() }
        };
        Self { meta, columns: (0..meta.per_row.unwrap_or(1)).map(column).collect() }
    }

    pub fn bytes(&self) -> usize {
        self.columns.iter().map(|column| column.numbers.byte_len() + column.mask.len()).sum()
    }

    /// Takes the captions of a row, which [`CaptionMeta::check_row`] has passed.
    pub fn push(&mut self, captions: &[Caption<'_>]) {
        let of_column = captions.len() / self.columns.len();
        for (column, captions) in self.columns.iter_mut().zip(captions.chunks(of_column)) {
            for Caption { embeddings, mask } in captions {
                let tokens = embeddings.len() / self.meta.dim;
                // That the numbers fit was checked.
                let _ = column.numbers.narrow(embeddings);
                column.tokens.push(tokens);
                if self.meta.masked {
                    match mask {
                        Some(mask) => column.mask.extend_from_slice(mask),
                        None => column.mask.resize(column.mask.len() + tokens, true),
                    }
                }
            }
            column.counts.push(captions.len());
        }
    }

    /// The columns, in the order of [`CaptionMeta::fields`].
    pub fn arrays(self) -> Vec<ArrayRef> {
        let (mut arrays, mut masks) = (Vec::new(), Vec::new());
        let CaptionMeta { dim, dtype, masked, per_row, .. } = self.meta;
        let rows = |captions: ArrayRef, counts: &[usize]| match per_row {
            Some(_) => captions,
            None => lists(captions, counts),
        };
        for Column { numbers, mask, tokens, counts } in self.columns {
            if masked {
                let mask: ArrayRef = Arc::new(BooleanArray::new(BooleanBuffer::from(mask), None));
                masks.push(rows(lists(mask, &tokens), &counts));
            }
            arrays.push(match numbers {
                Numbers::Bf16(numbers) => {
                    let bytes = tokens.iter().map(|tokens| tokens * dim * dtype.bytes());
                    Arc::new(BinaryArray::new(OffsetBuffer::from_lengths(bytes), little_endian(&numbers), None))
                        as ArrayRef
                }
                numbers => {
                    let all = tokens.iter().sum();
                    let offsets = OffsetBuffer::from_lengths(std::iter::repeat_n(dim, all));
                    let tokens_nd: ArrayRef =
                        Arc::new(ListArray::new(latent_item(dtype), offsets, numbers_array(numbers), None));
                    rows(lists(tokens_nd, &tokens), &counts)
                }
            });
        }
        arrays.into_iter().chain(masks).collect()
    }
}

fn lists(items: ArrayRef, lengths: &[usize]) -> ArrayRef {
    let item = item(items.data_type().clone());
    Arc::new(ListArray::new(item, OffsetBuffer::from_lengths(lengths.iter().copied()), items, None))
}

fn list(item_type: DataType) -> DataType {
    DataType::List(item(item_type))
}

fn item(data_type: DataType) -> FieldRef {
    Arc::new(Field::new("element", data_type, false))
}
