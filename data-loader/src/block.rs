//! Decoded rows in memory, in the precision in which they are stored.

use std::sync::Arc;

use bytemuck::cast_slice;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::RowShapes;
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
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F16(numbers) => cast_slice(numbers.reinterpret_cast()),
            Self::Bf16(numbers) => cast_slice(numbers.reinterpret_cast()),
            Self::F32(numbers) => cast_slice(numbers),
        }
    }
}

/// Where each row's numbers begin.
#[derive(Clone, Debug)]
pub(crate) enum Extents {
    /// Every row has this shape and so many numbers.
    Same { shape: Vec<usize>, numel: usize },
    /// Rows have shapes of their own; row `i` of the block has the numbers `offsets[i]..offsets[i + 1]`.
    Each { shapes: Arc<RowShapes>, offsets: Vec<usize> },
}

impl Extents {
    /// Of rows that lie one after the other.
    pub fn of(shapes: &Arc<RowShapes>, rows: &[u64]) -> Self {
        if let Some(shape) = shapes.same() {
            return Self::Same { shape: shape.to_vec(), numel: shape.iter().product() };
        }
        let mut offsets = Vec::with_capacity(rows.len() + 1);
        offsets.push(0);
        let mut end = 0;
        offsets.extend(rows.iter().map(|row| {
            end += shapes.of(*row).iter().product::<usize>();
            end
        }));
        Self::Each { shapes: shapes.clone(), offsets }
    }

    /// The first number of row `index`, or the end of the row before.
    pub fn offset(&self, index: usize) -> usize {
        match self {
            Self::Same { numel, .. } => index * numel,
            Self::Each { offsets, .. } => offsets[index],
        }
    }
}

/// Decoded rows: latents as stored, labels, row numbers.
///
/// Latent columns are numbered in the order: value or mean, log-variance (with moments), then the same of the mirrored
/// image (where stored).
#[derive(Clone, Debug)]
pub struct RowBlock {
    pub(crate) extents: Extents,
    pub(crate) rows: Vec<u64>,
    pub(crate) labels: Vec<i64>,
    pub(crate) latents: Vec<Numbers>,
    pub(crate) ids: Vec<String>,
}

impl RowBlock {
    pub(crate) fn zeros(
        stored: &[Stored],
        shapes: &Arc<RowShapes>,
        rows: Vec<u64>,
        with_labels: bool,
        with_ids: bool,
    ) -> Self {
        let count = rows.len();
        let extents = Extents::of(shapes, &rows);
        let numel = extents.offset(count);
        Self {
            extents,
            labels: vec![0; if with_labels { count } else { 0 }],
            latents: stored.iter().map(|column| Numbers::zeros(column.dtype, numel)).collect(),
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

    /// The labels; none where the data set has none.
    pub fn labels(&self) -> &[i64] {
        &self.labels
    }

    /// Number of latent columns.
    pub fn latent_columns(&self) -> usize {
        self.latents.len()
    }

    /// The shape of row `index`'s latents.
    pub fn latent_shape(&self, index: usize) -> &[usize] {
        match &self.extents {
            Extents::Same { shape, .. } => shape,
            Extents::Each { shapes, .. } => shapes.of(self.rows[index]),
        }
    }

    /// Numbers in a latent of row `index`.
    pub fn latent_numel(&self, index: usize) -> usize {
        self.extents.offset(index + 1) - self.extents.offset(index)
    }

    /// Writes row `index` of latent column `column` to `out`, which has that latent's length.
    ///
    /// # Panics
    /// If an index is out of range or `out` has another length.
    pub fn latent(&self, column: usize, index: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.latent_numel(index), "`out` must hold one latent");
        self.latents[column].widen(self.extents.offset(index), out);
    }

    /// Copies row `index` of latent column `column` as stored, in this machine's byte order.
    pub(crate) fn copy_stored(&self, column: usize, index: usize, out: &mut [u8]) {
        let numel = self.latent_numel(index);
        let start = self.extents.offset(index) * (out.len() / numel);
        out.copy_from_slice(&self.latents[column].as_bytes()[start..][..out.len()]);
    }
}
