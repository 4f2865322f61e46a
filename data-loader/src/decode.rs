//! From arrow arrays to rows of stored numbers.

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::buffer::{Buffer, ScalarBuffer};
use arrow::compute::{CastOptions, cast, cast_with_options};
use arrow::datatypes::{DataType, Float16Type, Float32Type, Int64Type};
use bytemuck::cast_slice;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::form::{Dtype, Stored};

/// Latents in the precision in which they are stored.
#[derive(Clone, Debug)]
pub(crate) enum Numbers {
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

impl Numbers {
    pub fn zeros(dtype: Dtype, numel: usize) -> Self {
        match dtype {
            Dtype::F16 => Self::F16(vec![f16::ZERO; numel]),
            Dtype::Bf16 => Self::Bf16(vec![bf16::ZERO; numel]),
            Dtype::F32 => Self::F32(vec![0.0; numel]),
        }
    }

    /// Widens `out.len()` numbers from `start` on.
    pub fn widen(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::F16(numbers) => numbers[range].convert_to_f32_slice(out),
            Self::Bf16(numbers) => numbers[range].convert_to_f32_slice(out),
            Self::F32(numbers) => out.copy_from_slice(&numbers[range]),
        }
    }

    /// The bytes of all numbers.
    fn bytes(&self) -> &[u8] {
        match self {
            Self::F16(numbers) => cast_slice(numbers.reinterpret_cast()),
            Self::Bf16(numbers) => cast_slice(numbers.reinterpret_cast()),
            Self::F32(numbers) => cast_slice(numbers),
        }
    }
}

/// Decoded rows: latents as stored, labels, row numbers.
///
/// Latent columns are numbered in the order: value or mean, log-variance (with moments), then the same of the mirrored
/// image (where stored).
#[derive(Clone, Debug)]
pub struct RowBlock {
    pub(crate) numel: usize,
    pub(crate) rows: Vec<u64>,
    pub(crate) labels: Vec<i64>,
    pub(crate) latents: Vec<Numbers>,
    pub(crate) ids: Vec<String>,
}

impl RowBlock {
    pub(crate) fn zeros(stored: &[Stored], rows: Vec<u64>, with_ids: bool) -> Self {
        let count = rows.len();
        Self {
            numel: stored[0].numel,
            labels: vec![0; count],
            latents: stored.iter().map(|column| Numbers::zeros(column.dtype, count * column.numel)).collect(),
            ids: if with_ids { vec![String::new(); count] } else { Vec::new() },
            rows,
        }
    }

    /// Rows in the block.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether the block has no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The data set row numbers.
    pub fn rows(&self) -> &[u64] {
        &self.rows
    }

    /// The labels.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Number of latent columns.
    pub fn latent_columns(&self) -> usize {
        self.latents.len()
    }

    /// Writes row `index` of latent column `column` to `out`, which has one latent's length.
    ///
    /// # Panics
    /// If an index is out of range or `out` has another length.
    pub fn latent(&self, column: usize, index: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.numel, "`out` must hold one latent");
        self.latents[column].widen(index * self.numel, out);
    }

    /// Copies row `index` of latent column `column` as stored, in this machine's byte order.
    pub(crate) fn copy_stored(&self, column: usize, index: usize, out: &mut [u8]) {
        out.copy_from_slice(&self.latents[column].bytes()[index * out.len()..][..out.len()]);
    }
}

/// What is wrong with a row of a batch.
#[derive(Debug)]
pub(crate) struct BadRow {
    /// The row in the batch.
    pub row: usize,
    pub found: String,
    pub expected: String,
}

/// All latents of a batch, one after the other; shares the batch's memory.
pub(crate) enum Flat {
    F16(ScalarBuffer<f16>),
    F32(ScalarBuffer<f32>),
    /// Little-endian numbers as raw bytes.
    Bytes(Buffer),
}

impl Flat {
    /// Checks every row of a batch's column against its layout.
    pub fn of(array: &ArrayRef, column: &Stored) -> Result<Self, BadRow> {
        if column.dims.is_empty() { Self::of_bytes(array, column) } else { Self::of_lists(array, column) }
    }

    fn of_lists(array: &ArrayRef, column: &Stored) -> Result<Self, BadRow> {
        let wrong = |row: usize, found: String| BadRow { row, found, expected: column.describe() };
        let (mut at, mut start, mut count, mut per_row) = (array.clone(), 0, array.len(), 1);
        for &dim in &column.dims {
            refuse_nulls(&at, start, count, per_row, &column.describe())?;
            // Lists lie one behind the other, so lists of one length make one contiguous stretch of items.
            let found_length = |row: usize, length: usize| wrong(row / per_row, format!("a list of {length}"));
            let (first, items) = match at.data_type() {
                DataType::FixedSizeList(_, length) => {
                    if *length as usize != dim {
                        return Err(found_length(0, *length as usize));
                    }
                    let lists = at.as_fixed_size_list();
                    (lists.value_offset_at(start), lists.values().clone())
                }
                DataType::List(_) => {
                    let lists = at.as_list::<i32>();
                    uniform(&lists.value_offsets()[start..=start + count], dim)
                        .map_err(|(row, length)| found_length(row, length))?;
                    (lists.value_offsets()[start] as usize, lists.values().clone())
                }
                DataType::LargeList(_) => {
                    let lists = at.as_list::<i64>();
                    uniform(&lists.value_offsets()[start..=start + count], dim)
                        .map_err(|(row, length)| found_length(row, length))?;
                    (lists.value_offsets()[start] as usize, lists.values().clone())
                }
                other => return Err(wrong(0, format!("a {other}"))),
            };
            (at, start, count, per_row) = (items, first, count * dim, per_row * dim);
        }
        refuse_nulls(&at, start, count, per_row, &column.describe())?;
        match (at.data_type(), column.dtype) {
            (DataType::Float16, Dtype::F16) => {
                Ok(Self::F16(at.as_primitive::<Float16Type>().values().slice(start, count)))
            }
            (DataType::Float32, Dtype::F32) => {
                Ok(Self::F32(at.as_primitive::<Float32Type>().values().slice(start, count)))
            }
            (other, _) => Err(wrong(0, format!("of {other}"))),
        }
    }

    fn of_bytes(array: &ArrayRef, column: &Stored) -> Result<Self, BadRow> {
        let wrong = |row: usize, found: String| BadRow { row, found, expected: column.describe() };
        refuse_nulls(array, 0, array.len(), 1, &column.describe())?;
        let row_bytes = column.numel * column.dtype.bytes();
        let found_length = |(row, length): (usize, usize)| wrong(row, format!("{length} bytes"));
        let (start, data) = match array.data_type() {
            DataType::FixedSizeBinary(length) => {
                if *length as usize != row_bytes {
                    return Err(found_length((0, *length as usize)));
                }
                let bytes = array.as_fixed_size_binary();
                (0, bytes.values().clone())
            }
            DataType::Binary => {
                let bytes = array.as_binary::<i32>();
                uniform(bytes.value_offsets(), row_bytes).map_err(found_length)?;
                (bytes.value_offsets()[0] as usize, bytes.values().clone())
            }
            DataType::LargeBinary => {
                let bytes = array.as_binary::<i64>();
                uniform(bytes.value_offsets(), row_bytes).map_err(found_length)?;
                (bytes.value_offsets()[0] as usize, bytes.values().clone())
            }
            DataType::BinaryView => {
                let plain = cast(array, &DataType::LargeBinary).map_err(|error| wrong(0, error.to_string()))?;
                return Self::of_bytes(&plain, column);
            }
            other => return Err(wrong(0, format!("a {other}"))),
        };
        Ok(Self::Bytes(data.slice_with_length(start, array.len() * row_bytes)))
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

fn fill<T, const N: usize>(bytes: &[u8], out: &mut [T], from_le_bytes: fn([u8; N]) -> T) {
    let (numbers, _) = bytes.as_chunks::<N>();
    for (out, number) in out.iter_mut().zip(numbers) {
        *out = from_le_bytes(*number);
    }
}

/// `Err` with the first stretch between neighbouring offsets that is not `length` long.
fn uniform<O: Copy + TryInto<usize> + std::ops::Sub<Output = O>>(
    offsets: &[O],
    length: usize,
) -> Result<(), (usize, usize)> {
    for (row, pair) in offsets.windows(2).enumerate() {
        let found = (pair[1] - pair[0]).try_into().unwrap_or(usize::MAX);
        if found != length {
            return Err((row, found));
        }
    }
    Ok(())
}

fn refuse_nulls(array: &ArrayRef, start: usize, count: usize, per_row: usize, expected: &str) -> Result<(), BadRow> {
    let Some(nulls) = array.logical_nulls().filter(|nulls| nulls.null_count() > 0) else {
        return Ok(());
    };
    match (start..start + count).find(|&at| nulls.is_null(at)) {
        None => Ok(()),
        Some(at) => Err(BadRow { row: (at - start) / per_row, found: "null".into(), expected: expected.into() }),
    }
}

/// The labels of a batch.
pub(crate) fn labels(array: &ArrayRef) -> Result<Vec<i64>, BadRow> {
    refuse_nulls(array, 0, array.len(), 1, "an integer")?;
    let options = CastOptions { safe: false, ..Default::default() };
    match cast_with_options(array, &DataType::Int64, &options) {
        Ok(numbers) => Ok(numbers.as_primitive::<Int64Type>().values().to_vec()),
        Err(error) => Err(BadRow { row: 0, found: error.to_string(), expected: "integers within int64".into() }),
    }
}

/// The ids of a batch as text.
pub(crate) fn ids(array: &ArrayRef) -> Result<Vec<String>, BadRow> {
    refuse_nulls(array, 0, array.len(), 1, "a name")?;
    match cast(array, &DataType::Utf8) {
        Ok(names) => Ok(names.as_string::<i32>().iter().map(|name| name.unwrap_or_default().to_owned()).collect()),
        Err(error) => Err(BadRow { row: 0, found: error.to_string(), expected: "text or integers".into() }),
    }
}

/// The list lengths of a one-row array from the outside in, or the byte length of its binary value. Stops at what is null
/// or empty.
pub(crate) fn first_lengths(array: &ArrayRef) -> Vec<usize> {
    let mut lengths = Vec::new();
    let mut at = array.clone();
    while !at.is_empty() && !at.is_null(0) {
        let items = match at.data_type() {
            DataType::List(_) => at.as_list::<i32>().value(0),
            DataType::LargeList(_) => at.as_list::<i64>().value(0),
            DataType::FixedSizeList(..) => at.as_fixed_size_list().value(0),
            DataType::Binary => return vec![at.as_binary::<i32>().value(0).len()],
            DataType::LargeBinary => return vec![at.as_binary::<i64>().value(0).len()],
            DataType::BinaryView => return vec![at.as_binary_view().value(0).len()],
            DataType::FixedSizeBinary(length) => return vec![*length as usize],
            _ => break,
        };
        lengths.push(items.len());
        at = items;
    }
    lengths
}
