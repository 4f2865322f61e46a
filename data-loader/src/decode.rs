//! From arrow arrays to rows of stored numbers.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::{Buffer, ScalarBuffer};
use arrow::compute::{CastOptions, cast, cast_with_options};
use arrow::datatypes::{DataType, Field, Float16Type, Float32Type, Float64Type, Int64Type};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::block::Numbers;
use crate::form::{Dtype, Stored, shape_numel, without_views};

/// What is wrong with a row of a batch.
#[derive(Debug)]
pub(crate) struct BadRow {
    /// The row in the batch.
    pub row: usize,
    pub found: String,
    pub expected: String,
}

/// The lengths that the rows of a batch must have, level by level; see [`Stored::dims_of`].
pub(crate) enum Dims {
    /// All rows.
    Same(Vec<usize>),
    /// Row by row.
    Each(Vec<Vec<usize>>),
}

impl Dims {
    fn of(&self, row: usize) -> &[usize] {
        match self {
            Self::Same(dims) => dims,
            Self::Each(rows) => &rows[row],
        }
    }
}

/// One level of lists, or the bytes of binary values: where each begins and ends among the items.
pub(crate) struct Level<'a> {
    offsets: Offsets<'a>,
    pub items: Items,
}

enum Offsets<'a> {
    I32(&'a [i32]),
    I64(&'a [i64]),
    /// Lists of one length, and where the first begins.
    Same(usize, usize),
}

pub(crate) enum Items {
    Of(ArrayRef),
    Bytes(Buffer),
}

impl<'a> Level<'a> {
    /// `None` for what is neither list nor bytes. Views are cast away before, see [`without_views`].
    pub fn of(array: &'a ArrayRef) -> Option<Self> {
        let (offsets, items) = match array.data_type() {
            DataType::List(_) => {
                let lists = array.as_list::<i32>();
                (Offsets::I32(lists.value_offsets()), Items::Of(lists.values().clone()))
            }
            DataType::LargeList(_) => {
                let lists = array.as_list::<i64>();
                (Offsets::I64(lists.value_offsets()), Items::Of(lists.values().clone()))
            }
            DataType::FixedSizeList(_, length) => {
                let lists = array.as_fixed_size_list();
                let first = if lists.is_empty() { 0 } else { lists.value_offset_at(0) };
                (Offsets::Same(*length as usize, first), Items::Of(lists.values().clone()))
            }
            DataType::Binary => {
                let bytes = array.as_binary::<i32>();
                (Offsets::I32(bytes.value_offsets()), Items::Bytes(bytes.values().clone()))
            }
            DataType::LargeBinary => {
                let bytes = array.as_binary::<i64>();
                (Offsets::I64(bytes.value_offsets()), Items::Bytes(bytes.values().clone()))
            }
            DataType::FixedSizeBinary(length) => {
                let bytes = array.as_fixed_size_binary();
                (Offsets::Same(*length as usize, 0), Items::Bytes(bytes.values().clone()))
            }
            _ => return None,
        };
        Some(Self { offsets, items })
    }

    /// The first item of list `at`.
    pub fn start(&self, at: usize) -> usize {
        match self.offsets {
            // Arrow's offsets are checked to be positive and to rise.
            Offsets::I32(offsets) => offsets[at] as usize,
            Offsets::I64(offsets) => offsets[at] as usize,
            Offsets::Same(length, first) => first + at * length,
        }
    }

    /// The items of list `at`.
    pub fn length(&self, at: usize) -> usize {
        self.start(at + 1) - self.start(at)
    }

    /// The first of `count` lists from `start` on that is not `length` long, counted from `start`.
    fn first_unlike(&self, start: usize, count: usize, length: usize) -> Option<usize> {
        match self.offsets {
            Offsets::I32(offsets) => {
                offsets[start..=start + count].windows(2).position(|pair| (pair[1] - pair[0]) as usize != length)
            }
            Offsets::I64(offsets) => {
                offsets[start..=start + count].windows(2).position(|pair| (pair[1] - pair[0]) as usize != length)
            }
            Offsets::Same(found, _) => (found != length && count > 0).then_some(0),
        }
    }
}

/// Which row of a batch a list or item of some level belongs to.
enum Owners {
    /// Every row has as many.
    Same { per_row: usize, rows: usize },
    /// The end of each row's.
    Each(Vec<usize>),
}

impl Owners {
    /// Of the rows themselves.
    fn of(dims: &Dims, rows: usize) -> Self {
        match dims {
            Dims::Same(_) => Self::Same { per_row: 1, rows },
            Dims::Each(_) => Self::Each((1..=rows).collect()),
        }
    }

    fn total(&self) -> usize {
        match self {
            Self::Same { per_row, rows } => per_row * rows,
            Self::Each(ends) => ends.last().copied().unwrap_or(0),
        }
    }

    fn row_of(&self, item: usize) -> usize {
        match self {
            Self::Same { per_row, .. } => item / per_row,
            Self::Each(ends) => ends.partition_point(|end| *end <= item),
        }
    }

    /// Of what is in the lists of level `depth`, which have the lengths `dims`.
    fn below(self, dims: &Dims, depth: usize) -> Self {
        match self {
            Self::Same { per_row, rows } => Self::Same { per_row: per_row * dims.of(0)[depth], rows },
            Self::Each(mut ends) => {
                let (mut before, mut end) = (0, 0);
                for (row, at) in ends.iter_mut().enumerate() {
                    end += (*at - before) * dims.of(row)[depth];
                    before = std::mem::replace(at, end);
                }
                Self::Each(ends)
            }
        }
    }
}

/// All latents of a batch, one after the other; shares the batch's memory.
#[derive(Clone, Debug)]
pub(crate) enum Flat {
    F16(ScalarBuffer<f16>),
    F32(ScalarBuffer<f32>),
    /// Little-endian numbers as raw bytes.
    Bytes(Buffer),
}

impl Flat {
    /// Checks every row of a batch's column against the lengths it must have.
    pub fn of(array: &ArrayRef, column: &Stored, dims: &Dims) -> Result<Self, BadRow> {
        let wrong = |row: usize, found: String| BadRow { row, found, expected: column.describe(dims.of(row)) };
        let (mut at, mut start, mut owners) = (without_view(array)?, 0, Owners::of(dims, array.len()));
        let refuse_null = |at: &ArrayRef, start: usize, owners: &Owners| match first_null(at, start, owners.total()) {
            Some(null) => Err(wrong(owners.row_of(null), "null".into())),
            None => Ok(()),
        };
        for depth in 0..column.levels.max(1) {
            refuse_null(&at, start, &owners)?;
            let Some(level) = Level::of(&at) else {
                return Err(wrong(0, format!("a {}", at.data_type())));
            };
            // Lists lie one behind the other, so lists of known lengths make one contiguous stretch of items.
            let unlike = match dims {
                Dims::Same(dims) => level.first_unlike(start, owners.total(), dims[depth]),
                Dims::Each(rows) => {
                    (0..owners.total()).find(|list| level.length(start + list) != rows[owners.row_of(*list)][depth])
                }
            };
            if let Some(list) = unlike {
                let length = level.length(start + list);
                let found = if column.levels == 0 { format!("{length} bytes") } else { format!("a list of {length}") };
                return Err(wrong(owners.row_of(list), found));
            }
            start = level.start(start);
            owners = owners.below(dims, depth);
            at = match level.items {
                Items::Of(items) => items,
                Items::Bytes(bytes) => return Ok(Self::Bytes(bytes.slice_with_length(start, owners.total()))),
            };
        }
        let expected = || column.describe(dims.of(0));
        numbers(&at, start, owners.total(), column.dtype, |item| owners.row_of(item), expected)
    }

    /// Widens `out.len()` numbers from `from` on; `dtype` is that of bytes.
    pub fn widen(&self, dtype: Dtype, from: usize, out: &mut [f32]) {
        let range = from..from + out.len();
        match (self, dtype) {
            (Self::F16(numbers), _) => numbers[range].convert_to_f32_slice(out),
            (Self::F32(numbers), _) => out.copy_from_slice(&numbers[range]),
            (Self::Bytes(bytes), Dtype::F16) => {
                fill(&bytes[range.start * 2..range.end * 2], out, |bytes| f16::from_le_bytes(bytes).to_f32())
            }
            (Self::Bytes(bytes), Dtype::Bf16) => {
                fill(&bytes[range.start * 2..range.end * 2], out, |bytes| bf16::from_le_bytes(bytes).to_f32())
            }
            (Self::Bytes(bytes), Dtype::F32) => fill(&bytes[range.start * 4..range.end * 4], out, f32::from_le_bytes),
        }
    }

    /// Copies `numel` numbers from `from` on to `out` at `to`.
    pub fn copy(&self, from: usize, numel: usize, out: &mut Numbers, to: usize) {
        match (self, out) {
            (Self::F16(numbers), Numbers::F16(out)) => {
                out[to..to + numel].copy_from_slice(&numbers[from..from + numel])
            }
            (Self::F32(numbers), Numbers::F32(out)) => {
                out[to..to + numel].copy_from_slice(&numbers[from..from + numel])
            }
            (Self::Bytes(bytes), Numbers::F16(out)) => {
                fill(&bytes[from * 2..(from + numel) * 2], &mut out[to..to + numel], f16::from_le_bytes)
            }
            (Self::Bytes(bytes), Numbers::Bf16(out)) => {
                fill(&bytes[from * 2..(from + numel) * 2], &mut out[to..to + numel], bf16::from_le_bytes)
            }
            (Self::Bytes(bytes), Numbers::F32(out)) => {
                fill(&bytes[from * 4..(from + numel) * 4], &mut out[to..to + numel], f32::from_le_bytes)
            }
            // `of` yields lists only in the column's own dtype.
            _ => unreachable!("a list column is decoded in its own number type"),
        }
    }
}

/// The `count` numbers of a list's items from `start` on, none of them null.
pub(crate) fn numbers(
    at: &ArrayRef,
    start: usize,
    count: usize,
    dtype: Dtype,
    row_of: impl Fn(usize) -> usize,
    expected: impl Fn() -> String,
) -> Result<Flat, BadRow> {
    if let Some(null) = first_null(at, start, count) {
        return Err(BadRow { row: row_of(null), found: "null".into(), expected: expected() });
    }
    match (at.data_type(), dtype) {
        (DataType::Float16, Dtype::F16) => Ok(Flat::F16(at.as_primitive::<Float16Type>().values().slice(start, count))),
        (DataType::Float32, Dtype::F32) => Ok(Flat::F32(at.as_primitive::<Float32Type>().values().slice(start, count))),
        (DataType::Float64, Dtype::F32) => {
            let numbers = &at.as_primitive::<Float64Type>().values()[start..start + count];
            let too_large = |number: &f64| number.is_finite() && (*number as f32).is_infinite();
            match numbers.iter().position(too_large) {
                None => Ok(Flat::F32(numbers.iter().map(|number| *number as f32).collect())),
                Some(item) => Err(BadRow {
                    row: row_of(item),
                    found: format!("{:e}", numbers[item]),
                    expected: "numbers within the range of float32".into(),
                }),
            }
        }
        (other, _) => Err(BadRow { row: 0, found: format!("of {other}"), expected: expected() }),
    }
}

fn fill<T, const N: usize>(bytes: &[u8], out: &mut [T], from_le_bytes: fn([u8; N]) -> T) {
    let (numbers, _) = bytes.as_chunks::<N>();
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = from_le_bytes(*number);
    }
}

/// The array with its items in order; the same memory if there is no view in it.
pub(crate) fn without_view(array: &ArrayRef) -> Result<ArrayRef, BadRow> {
    let plain = without_views(array.data_type());
    if plain == *array.data_type() {
        return Ok(array.clone());
    }
    cast(array, &plain).map_err(|error| BadRow { row: 0, found: error.to_string(), expected: plain.to_string() })
}

/// The first null of `count` values from `start` on, counted from `start`.
pub(crate) fn first_null(array: &ArrayRef, start: usize, count: usize) -> Option<usize> {
    let nulls = array.logical_nulls().filter(|nulls| nulls.null_count() > 0)?;
    (0..count).find(|at| nulls.is_null(start + at))
}

fn refuse_nulls(array: &ArrayRef, expected: &str) -> Result<(), BadRow> {
    match first_null(array, 0, array.len()) {
        Some(row) => Err(BadRow { row, found: "null".into(), expected: expected.into() }),
        None => Ok(()),
    }
}

/// The labels of a batch.
pub(crate) fn labels(array: &ArrayRef) -> Result<Vec<i64>, BadRow> {
    refuse_nulls(array, "an integer")?;
    let options = CastOptions { safe: false, ..Default::default() };
    match cast_with_options(array, &DataType::Int64, &options) {
        Ok(numbers) => Ok(numbers.as_primitive::<Int64Type>().values().to_vec()),
        Err(error) => Err(BadRow { row: 0, found: error.to_string(), expected: "integers within int64".into() }),
    }
}

/// The ids of a batch as text.
pub(crate) fn ids(array: &ArrayRef) -> Result<Vec<String>, BadRow> {
    refuse_nulls(array, "a name")?;
    match cast(array, &DataType::Utf8) {
        Ok(names) => Ok(names.as_string::<i32>().iter().map(|name| name.unwrap_or_default().to_owned()).collect()),
        Err(error) => Err(BadRow { row: 0, found: error.to_string(), expected: "text or integers".into() }),
    }
}

/// The shapes that a column of integer lists tells, row by row.
pub(crate) fn shapes(array: &ArrayRef) -> Result<Vec<Vec<usize>>, BadRow> {
    const EXPECTED: &str = "a list of positive integers such as [4, 32, 24]";
    let lists = DataType::LargeList(Field::new("item", DataType::Int64, true).into());
    let options = CastOptions { safe: false, ..Default::default() };
    let lists = cast_with_options(array, &lists, &options).map_err(|error| BadRow {
        row: 0,
        found: error.to_string(),
        expected: EXPECTED.into(),
    })?;
    refuse_nulls(&lists, EXPECTED)?;
    let lists = lists.as_list::<i64>();
    let shape = |row: usize| {
        let numbers = lists.value(row);
        let numbers = numbers.as_primitive::<Int64Type>();
        let wrong =
            || BadRow { row, found: format!("{:?}", numbers.iter().collect::<Vec<_>>()), expected: EXPECTED.into() };
        let shape: Option<Vec<usize>> =
            numbers.iter().map(|dim| dim.and_then(|dim| usize::try_from(dim).ok())).collect();
        shape.filter(|shape| shape_numel(shape).is_some()).ok_or_else(wrong)
    };
    (0..lists.len()).map(shape).collect()
}

/// The shapes that nested lists have, row by row, as each list's first list tells.
pub(crate) fn nested_shapes(array: &ArrayRef, levels: usize) -> Result<Vec<Vec<usize>>, BadRow> {
    let rows = array.len();
    let wrong = |row: usize, found: &str| {
        let expected = format!("{levels} nested lists, none of them empty, of at most 2^28 numbers in all");
        BadRow { row, found: found.into(), expected }
    };
    let mut shapes = vec![Vec::with_capacity(levels); rows];
    let (mut at, mut firsts) = (without_view(array)?, (0..rows).collect::<Vec<usize>>());
    for _ in 0..levels {
        let nulls = at.logical_nulls();
        let Some(level) = Level::of(&at) else {
            return Err(wrong(0, &format!("a {}", at.data_type())));
        };
        for (row, first) in firsts.iter_mut().enumerate() {
            if nulls.as_ref().is_some_and(|nulls| nulls.is_null(*first)) {
                return Err(wrong(row, "null"));
            }
            let length = level.length(*first);
            if length == 0 {
                return Err(wrong(row, "an empty list"));
            }
            shapes[row].push(length);
            *first = level.start(*first);
        }
        at = match level.items {
            Items::Of(items) => items,
            Items::Bytes(_) => return Err(wrong(0, "binary")),
        };
    }
    match shapes.iter().position(|shape| shape_numel(shape).is_none()) {
        Some(row) => Err(wrong(row, &format!("of lengths {:?}", shapes[row]))),
        None => Ok(shapes),
    }
}

/// The list lengths of a one-row array from the outside in, or the byte length of its binary value. Stops at what is null
/// or empty.
pub(crate) fn first_lengths(array: &ArrayRef) -> Vec<usize> {
    let mut lengths = Vec::new();
    let Ok(mut at) = without_view(array) else { return lengths };
    let mut first = 0;
    while first < at.len() && !at.is_null(first) {
        let Some(level) = Level::of(&at) else { break };
        lengths.push(level.length(first));
        first = level.start(first);
        at = match level.items {
            // An empty list has no first item; what follows is another row's.
            Items::Of(items) if lengths.last() != Some(&0) => items,
            _ => break,
        };
    }
    lengths
}
