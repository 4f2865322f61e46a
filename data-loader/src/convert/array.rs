//! Arrays as other formats store them: a number type, a shape, little-endian bytes.

use half::{bf16, f16};

use crate::Dtype;
use crate::form::shape_numel;

/// A number type of the formats that are converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    Float(Dtype),
    F64,
    Signed(usize),
    Unsigned(usize),
}

impl Element {
    /// numpy's long names, and `bfloat16`.
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "float16" => Self::Float(Dtype::F16),
            "bfloat16" => Self::Float(Dtype::Bf16),
            "float32" => Self::Float(Dtype::F32),
            "float64" => Self::F64,
            "int8" => Self::Signed(1),
            "int16" => Self::Signed(2),
            "int32" => Self::Signed(4),
            "int64" => Self::Signed(8),
            "uint8" => Self::Unsigned(1),
            "uint16" => Self::Unsigned(2),
            "uint32" => Self::Unsigned(4),
            "uint64" => Self::Unsigned(8),
            _ => return None,
        })
    }

    /// numpy's long name.
    pub fn name(self) -> String {
        match self {
            Self::Float(Dtype::F16) => "float16".into(),
            Self::Float(Dtype::Bf16) => "bfloat16".into(),
            Self::Float(Dtype::F32) => "float32".into(),
            Self::F64 => "float64".into(),
            Self::Signed(bytes) => format!("int{}", bytes * 8),
            Self::Unsigned(bytes) => format!("uint{}", bytes * 8),
        }
    }

    /// Bytes of one number.
    pub fn bytes(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.bytes(),
            Self::F64 => 8,
            Self::Signed(bytes) | Self::Unsigned(bytes) => bytes,
        }
    }

    /// The numbers in `bytes`, f64 rounded to f32.
    ///
    /// # Errors
    /// With the words for a message, if these are no floating-point numbers.
    pub fn floats(self, bytes: &[u8]) -> Result<Vec<f32>, String> {
        Ok(match self {
            Self::Float(Dtype::F16) => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Self::Float(Dtype::Bf16) => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Self::Float(Dtype::F32) => each(bytes, f32::from_le_bytes),
            Self::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            other => return Err(format!("holds {}; expected float16, float32 or float64", other.name())),
        })
    }

    /// The numbers in `bytes`.
    ///
    /// # Errors
    /// With the words for a message, if these are no integers or too large ones.
    pub fn integers(self, bytes: &[u8]) -> Result<Vec<i64>, String> {
        Ok(match self {
            Self::Signed(1) => each(bytes, |b| i64::from(i8::from_le_bytes(b))),
            Self::Signed(2) => each(bytes, |b| i64::from(i16::from_le_bytes(b))),
            Self::Signed(4) => each(bytes, |b| i64::from(i32::from_le_bytes(b))),
            Self::Signed(8) => each(bytes, i64::from_le_bytes),
            Self::Unsigned(1) => each(bytes, |b: [u8; 1]| i64::from(b[0])),
            Self::Unsigned(2) => each(bytes, |b| i64::from(u16::from_le_bytes(b))),
            Self::Unsigned(4) => each(bytes, |b| i64::from(u32::from_le_bytes(b))),
            Self::Unsigned(8) => each(bytes, u64::from_le_bytes)
                .into_iter()
                .map(|number| i64::try_from(number).map_err(|_| format!("holds {number}; expected a class")))
                .collect::<Result<_, _>>()?,
            other => return Err(format!("holds {}; expected integers", other.name())),
        })
    }

    /// The narrowest type of latents that holds these numbers; `None` for integers.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Float(dtype) => Some(dtype),
            Self::F64 => Some(Dtype::F32),
            _ => None,
        }
    }
}

fn each<T, const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)).collect()
}

/// `numbers` as little-endian bytes of a floating-point type, rounded.
pub(super) fn to_bytes(dtype: Dtype, numbers: &[f32], out: &mut Vec<u8>) {
    match dtype {
        Dtype::F16 => out.extend(numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes())),
        Dtype::Bf16 => out.extend(numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes())),
        Dtype::F32 => out.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
    }
}

/// A latent, or the moments of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Array {
    pub element: Element,
    pub shape: Vec<usize>,
    pub numbers: Vec<f32>,
}

impl Array {
    /// # Errors
    /// With the words for a message, if type, shape and length do not agree.
    pub fn of(element: Element, shape: Vec<usize>, bytes: &[u8]) -> Result<Self, String> {
        let numel = shape_numel(&shape)
            .ok_or_else(|| format!("has shape {shape:?}; expected positive lengths, at most 2^28 numbers"))?;
        let expected = numel * element.bytes();
        if bytes.len() != expected {
            return Err(format!("has {} bytes; shape {shape:?} of {} takes {expected}", bytes.len(), element.name()));
        }
        Ok(Self { numbers: element.floats(bytes)?, element, shape })
    }

    /// Without the batch axis: a leading 1 of four or more axes.
    pub fn of_one_sample(mut self) -> Self {
        if self.shape.len() >= 4 && self.shape[0] == 1 {
            self.shape.remove(0);
        }
        self
    }

    /// Mean and log-variance of moments that lie one behind the other along the channels.
    ///
    /// # Errors
    /// With the words for a message, if the channels cannot be halved.
    pub fn into_moments(mut self) -> Result<[Self; 2], String> {
        if !self.shape[0].is_multiple_of(2) {
            return Err(format!("has shape {:?}; moments have an even number of channels", self.shape));
        }
        self.shape[0] /= 2;
        let logvar = self.numbers.split_off(self.numbers.len() / 2);
        let logvar = Self { element: self.element, shape: self.shape.clone(), numbers: logvar };
        Ok([self, logvar])
    }
}
