//! How a latent is laid out in a column: list nesting or raw bytes, number type, shape.

use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field};

/// The number type in which latents are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    Bf16,
    /// IEEE single precision.
    F32,
}

impl Dtype {
    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }

    /// Whether a number is finite and still is when it is rounded to this type.
    pub(crate) fn holds(self, number: f32) -> bool {
        match self {
            // Halfway between the largest number and what would be the next, ties go to infinity.
            Self::F16 => number.abs() < 65520.0,
            Self::Bf16 => number.abs() < f32::from_bits(0x7f7f_8000),
            Self::F32 => number.is_finite(),
        }
    }

    /// Reads `f16`, `bf16`, `f32` and the long names.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "f16" | "float16" => Some(Self::F16),
            "bf16" | "bfloat16" => Some(Self::Bf16),
            "f32" | "float32" => Some(Self::F32),
            _ => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
        })
    }
}

/// The forms of a latent column that can be read, for messages.
pub(crate) const READABLE: &str =
    "a (nested) list, large_list or fixed_size_list of float16, float32 or float64, or (fixed-size) binary";

/// What is at the bottom of a column's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaf {
    F16,
    F32,
    /// Rounded to f32 when read.
    F64,
    /// Raw little-endian numbers, with the length in bytes where the type fixes it.
    Bytes(Option<usize>),
}

/// The type of a latent column, without names and nullability.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    /// List levels from the outside; `Some` where the type fixes the length.
    pub levels: Vec<Option<usize>>,
    pub leaf: Leaf,
}

impl Form {
    /// The form of a column, `None` if it cannot hold latents.
    pub fn of(data_type: &DataType) -> Option<Self> {
        let mut levels = Vec::new();
        let mut at = data_type;
        loop {
            let leaf = match at {
                DataType::List(item)
                | DataType::LargeList(item)
                | DataType::ListView(item)
                | DataType::LargeListView(item) => {
                    levels.push(None);
                    at = item.data_type();
                    continue;
                }
                DataType::FixedSizeList(item, length) => {
                    levels.push(Some(usize::try_from(*length).ok()?));
                    at = item.data_type();
                    continue;
                }
                DataType::Float16 => Leaf::F16,
                DataType::Float32 => Leaf::F32,
                DataType::Float64 => Leaf::F64,
                DataType::Binary | DataType::LargeBinary | DataType::BinaryView => Leaf::Bytes(None),
                DataType::FixedSizeBinary(length) => Leaf::Bytes(Some(usize::try_from(*length).ok()?)),
                _ => return None,
            };
            // Numbers need a list around them, bytes must have none.
            let bytes = matches!(leaf, Leaf::Bytes(_));
            return (levels.is_empty() == bytes).then_some(Self { levels, leaf });
        }
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for level in &self.levels {
            match level {
                Some(length) => write!(f, "list[{length}] of ")?,
                None => f.write_str("list of ")?,
            }
        }
        match self.leaf {
            Leaf::F16 => f.write_str("float16"),
            Leaf::F32 => f.write_str("float32"),
            Leaf::F64 => f.write_str("float64"),
            Leaf::Bytes(Some(length)) => write!(f, "binary[{length}]"),
            Leaf::Bytes(None) => f.write_str("binary"),
        }
    }
}

/// The same type without views, whose items may lie in any order; what the decoder knows.
pub(crate) fn without_views(data_type: &DataType) -> DataType {
    let plain =
        |item: &Arc<Field>| Arc::new(Field::new(item.name(), without_views(item.data_type()), item.is_nullable()));
    match data_type {
        DataType::ListView(item) | DataType::LargeListView(item) => DataType::LargeList(plain(item)),
        DataType::List(item) => DataType::List(plain(item)),
        DataType::LargeList(item) => DataType::LargeList(plain(item)),
        DataType::FixedSizeList(item, length) => DataType::FixedSizeList(plain(item), *length),
        DataType::BinaryView => DataType::LargeBinary,
        other => other.clone(),
    }
}

/// A latent column with everything that decoding it takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub name: String,
    /// List levels; 0 for bytes, 1 where one list holds all numbers.
    pub levels: usize,
    /// Lengths of the list levels; empty for bytes, and where rows have shapes of their own.
    pub dims: Vec<usize>,
    pub dtype: Dtype,
    /// Numbers in one row; 0 where rows have shapes of their own.
    pub numel: usize,
}

impl Stored {
    /// Settles a column's layout against the data set's shape.
    ///
    /// # Errors
    /// With the words for a message, if type and shape cannot be reconciled.
    pub fn resolve(
        name: &str,
        form: &Form,
        shape: &[usize],
        bytes_dtype: Option<Dtype>,
        first_len_bytes: Option<usize>,
    ) -> Result<Self, String> {
        // `shape_numel` has checked the product.
        let numel = shape.iter().product::<usize>();
        let dtype = match form.leaf {
            Leaf::Bytes(length) => {
                let length = length.or(first_len_bytes).unwrap_or(numel * 4);
                match bytes_dtype {
                    Some(dtype) if numel * dtype.bytes() == length => dtype,
                    Some(dtype) => {
                        return Err(format!(
                            "holds {length} bytes; shape {shape:?} in {dtype} takes {}",
                            numel * dtype.bytes()
                        ));
                    }
                    None if length == numel * 4 => Dtype::F32,
                    None if length == numel * 2 => Dtype::F16,
                    None => {
                        return Err(format!(
                            "holds {length} bytes; shape {shape:?} takes {} (f16, bf16) or {} (f32)",
                            numel * 2,
                            numel * 4
                        ));
                    }
                }
            }
            Leaf::F16 => Dtype::F16,
            Leaf::F32 | Leaf::F64 => Dtype::F32,
        };
        let levels = form.levels.len();
        if levels > 1 && levels != shape.len() {
            return Err(format!(
                "nests {levels} lists; shape {shape:?} takes {} or one flat list of {numel}",
                shape.len()
            ));
        }
        let mut column = Self { name: name.to_owned(), levels, dims: Vec::new(), dtype, numel };
        if levels > 0 {
            column.dims = column.dims_of(shape);
        }
        if form.levels.iter().zip(&column.dims).any(|(level, dim)| level.is_some_and(|length| length != *dim)) {
            return Err(format!("is {form}; shape {shape:?} takes lengths {:?}", column.dims));
        }
        Ok(column)
    }

    /// The same column where rows have shapes of their own.
    pub fn of_any_shape(self) -> Self {
        Self { dims: Vec::new(), numel: 0, ..self }
    }

    /// The lengths that a row of `shape` must have: of its list levels, or of its bytes.
    pub fn dims_of(&self, shape: &[usize]) -> Vec<usize> {
        let numel = shape.iter().product::<usize>();
        match self.levels {
            0 => vec![numel * self.dtype.bytes()],
            1 => vec![numel],
            _ => shape.to_vec(),
        }
    }

    /// What a row of such lengths is, for messages.
    pub fn describe(&self, dims: &[usize]) -> String {
        match dims {
            [bytes] if self.levels == 0 => format!("{bytes} bytes ({} × {})", bytes / self.dtype.bytes(), self.dtype),
            dims => format!("lists of lengths {dims:?}"),
        }
    }
}

/// Whether the dimensions that are told make a shape, whatever the others are.
pub(crate) fn is_template(dims: &[Option<usize>]) -> bool {
    shape_numel(&dims.iter().map(|dim| dim.unwrap_or(1)).collect::<Vec<_>>()).is_some()
}

/// Numbers in a latent of `shape`: 1 to 2^28 of them.
pub(crate) fn shape_numel(shape: &[usize]) -> Option<usize> {
    const MOST: usize = 1 << 28;
    let numel = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))?;
    (!shape.is_empty() && (1..=MOST).contains(&numel)).then_some(numel)
}
