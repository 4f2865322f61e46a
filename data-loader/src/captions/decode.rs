//! From arrow arrays to captions.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::BooleanBuffer;
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field};

use super::layout::{CaptionLayout, CaptionMeta, Nesting};
use crate::decode::{BadRow, Flat, Items, Level, first_null, numbers, without_view};

/// The row of each caption, and its tokens.
pub(super) type Captions = Vec<(usize, usize)>;

/// A batch's captions, one after the other.
pub(super) fn captions(array: &ArrayRef, layout: &CaptionLayout) -> Result<(Flat, Captions), BadRow> {
    let (dim, dtype) = (layout.meta.dim, layout.meta.dtype);
    let expected = || match layout.nesting {
        Nesting::Several(captions, tokens) => format!("{captions} captions of {tokens} tokens of {dim} numbers"),
        _ => format!("captions of tokens of {dim} numbers"),
    };
    let bad = |row: usize, found: String, expected: String| BadRow { row, found, expected };
    let lists = match layout.nesting {
        Nesting::Captions => 2,
        Nesting::Tokens => 1,
        Nesting::One | Nesting::Several(..) => 0,
    };
    // The rows that the lists of the level belong to.
    let mut rows: Vec<usize> = (0..array.len()).collect();
    let (mut at, mut start) = (without_view(array)?, 0);
    let mut captions = Captions::new();
    for depth in 0..=lists {
        if let Some(null) = first_null(&at, start, rows.len()) {
            return Err(bad(rows[null], "null".into(), expected()));
        }
        let Some(level) = Level::of(&at) else {
            return Err(bad(0, format!("a {}", at.data_type()), expected()));
        };
        let lengths = (0..rows.len()).map(|list| level.length(start + list));
        if depth < lists {
            let of_tokens = depth + 1 == lists;
            if let Some(empty) = lengths.clone().position(|length| length == 0) {
                let found = if of_tokens { "a caption without tokens" } else { "a row without captions" };
                return Err(bad(rows[empty], found.into(), "at least one".into()));
            }
            if of_tokens {
                captions = rows.iter().copied().zip(lengths.clone()).collect();
            }
            let below = rows.iter().zip(lengths).flat_map(|(row, length)| std::iter::repeat_n(*row, length));
            let below: Vec<usize> = below.collect();
            start = level.start(start);
            rows = below;
        } else {
            let bytes = matches!(level.items, Items::Bytes(_));
            let unit = if bytes { dim * dtype.bytes() } else { dim };
            for (row, length) in rows.iter().zip(lengths) {
                match layout.nesting {
                    Nesting::Captions | Nesting::Tokens if length == dim && !bytes => {}
                    Nesting::Captions | Nesting::Tokens => {
                        return Err(bad(*row, format!("a token of {length} numbers"), dim.to_string()));
                    }
                    Nesting::One if length > 0 && length % unit == 0 => captions.push((*row, length / unit)),
                    Nesting::Several(count, tokens) if length == count * tokens * unit => {
                        captions.extend(std::iter::repeat_n((*row, tokens), count));
                    }
                    _ => {
                        let found = format!("{length} {}", if bytes { "bytes" } else { "numbers" });
                        return Err(bad(
                            *row,
                            found,
                            format!("{} ({unit} {} a token)", expected(), if bytes { "bytes" } else { "numbers" }),
                        ));
                    }
                }
            }
            start = level.start(start);
        }
        at = match level.items {
            Items::Of(items) => items,
            Items::Bytes(bytes) => {
                let tokens: usize = captions.iter().map(|(_, tokens)| tokens).sum();
                return Ok((Flat::Bytes(bytes.slice_with_length(start, tokens * dim * dtype.bytes())), captions));
            }
        };
    }
    // The row of each token, for messages.
    let ends: Vec<usize> = captions
        .iter()
        .scan(0, |end, (_, tokens)| {
            *end += tokens;
            Some(*end)
        })
        .collect();
    let row_of = |item: usize| captions[ends.partition_point(|end| *end * dim <= item)].0;
    let count = ends.last().copied().unwrap_or(0) * dim;
    Ok((numbers(&at, start, count, dtype, row_of, expected)?, captions))
}

/// Refuses captions that are more or longer than the data set tells.
pub(super) fn check_counts(captions: &Captions, layout: &CaptionLayout) -> Result<(), BadRow> {
    let CaptionMeta { most_tokens, per_row, .. } = layout.meta;
    for caption in captions.chunk_by(|a, b| a.0 == b.0) {
        let (row, count) = (caption[0].0, caption.len());
        if let Some(most) = most_tokens
            && let Some((_, tokens)) = caption.iter().find(|(_, tokens)| *tokens > most)
        {
            let expected = format!("at most {most}, as the metadata says");
            return Err(BadRow { row, found: format!("a caption of {tokens} tokens"), expected });
        }
        if let Some(expected) = per_row.filter(|_| layout.nesting == Nesting::Captions && per_row != Some(count)) {
            let expected = format!("{expected}, as the metadata says");
            return Err(BadRow { row, found: format!("{count} captions"), expected });
        }
    }
    Ok(())
}

/// The masks of a batch's captions, token by token.
pub(super) fn mask(array: &ArrayRef, captions: &Captions, nesting: Nesting) -> Result<BooleanBuffer, BadRow> {
    let list = |item: DataType| DataType::LargeList(Field::new("item", item, true).into());
    let nested = matches!(nesting, Nesting::Captions | Nesting::Several(..));
    let wanted = if nested { list(list(DataType::Boolean)) } else { list(DataType::Boolean) };
    let bad = |row: usize, found: String, expected: String| BadRow { row, found, expected };
    let mut at = cast(array, &wanted).map_err(|error| {
        bad(0, format!("a {} ({error})", array.data_type()), "lists of booleans or integers".into())
    })?;
    let mut rows: Vec<usize> = (0..array.len()).collect();
    let mut start = 0;
    let refuse_null = |at: &ArrayRef, start: usize, rows: &[usize]| match first_null(at, start, rows.len()) {
        Some(null) => Err(bad(rows[null], "null".into(), "a list of booleans".into())),
        None => Ok(()),
    };
    if nested {
        refuse_null(&at, start, &rows)?;
        let (items, first, below) = {
            let lists = at.as_list::<i64>();
            let counts = rows.iter().map(|row| lists.value_length(*row) as usize);
            let below: Vec<usize> =
                rows.iter().zip(counts).flat_map(|(row, count)| std::iter::repeat_n(*row, count)).collect();
            (lists.values().clone(), lists.value_offsets()[0] as usize, below)
        };
        let wanted: Vec<usize> = captions.iter().map(|(row, _)| *row).collect();
        if below != wanted {
            let count = |of: &[usize], row: usize| of.iter().filter(|other| **other == row).count();
            let row = rows.iter().copied().find(|row| count(&below, *row) != count(&wanted, *row)).unwrap_or(0);
            return Err(bad(
                row,
                format!("{} masks", count(&below, row)),
                format!("{}, one per caption", count(&wanted, row)),
            ));
        }
        (at, start, rows) = (items, first, below);
    }
    refuse_null(&at, start, &rows)?;
    let lists = at.as_list::<i64>();
    let (values, first) = (lists.values().clone(), lists.value_offsets()[start] as usize);
    let mut end = first;
    let stored = values.as_boolean();
    for (index, (row, tokens)) in captions.iter().enumerate() {
        let length = lists.value_length(start + index) as usize;
        if length != *tokens {
            return Err(bad(*row, format!("a list of {length}"), format!("{tokens}, one per token")));
        }
        if let Some(null) = first_null(&values, end, length) {
            return Err(bad(*row, format!("null at token {null}"), "booleans".into()));
        }
        if (end..end + length).all(|token| !stored.value(token)) {
            return Err(bad(*row, "false for every token".into(), "at least one token that counts".into()));
        }
        end += length;
    }
    Ok(stored.values().slice(first, end - first))
}
