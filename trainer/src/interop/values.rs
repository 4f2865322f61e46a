//! Values of the dtypes that weights come in.

use super::InteropError;
use half::{bf16, f16};
pub use safetensors::Dtype;
use tch::{Kind, Tensor};

/// A tensor as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct RawTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Shape; `[]` is a scalar.
    pub shape: Vec<usize>,
    /// Row-major, little-endian.
    pub bytes: Vec<u8>,
}

/// Name, dtype and shape of a tensor whose values have not been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Element type.
    pub dtype: Dtype,
    /// Shape; `[]` is a scalar.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Elements; saturates.
    pub fn numel(&self) -> usize {
        self.shape.iter().fold(1, |product, &side| product.saturating_mul(side))
    }

    /// Bytes of the values; saturates.
    pub fn bytes(&self) -> usize {
        self.numel().saturating_mul(self.dtype.bitsize()) / 8
    }
}

impl RawTensor {
    /// The values as float32: f16 and bf16 widen exactly, f64 and integers are rounded to nearest.
    ///
    /// # Errors
    /// The dtype's name, when it is none of f64, f32, f16, bf16, i64, i32, i16, i8, u8, bool.
    pub fn to_f32(&self) -> Result<Vec<f32>, String> {
        fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            bytes.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
        }
        let bytes = &self.bytes;
        Ok(match self.dtype {
            Dtype::F32 => each(bytes, f32::from_le_bytes),
            Dtype::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
            Dtype::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f32),
            Dtype::I32 => each(bytes, |b| i32::from_le_bytes(b) as f32),
            Dtype::I16 => each(bytes, |b| f32::from(i16::from_le_bytes(b))),
            Dtype::I8 => each(bytes, |b: [u8; 1]| f32::from(b[0].cast_signed())),
            Dtype::U8 | Dtype::BOOL => each(bytes, |b: [u8; 1]| f32::from(b[0])),
            other => return Err(format!("has dtype {other}; expected F32, F16, BF16, F64 or an integer type")),
        })
    }
}

/// `values` as bytes of `dtype` (rounded to nearest even), little-endian.
///
/// # Panics
/// For a dtype other than F32, F16, BF16: a mistake of the caller.
pub fn encode(values: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
        other => panic!("weights are not written as {other}"),
    }
}

/// A float32 tensor on the CPU.
///
/// # Errors
/// When `shape` does not have as many elements.
pub fn tensor(values: &[f32], shape: &[usize]) -> Result<Tensor, InteropError> {
    let shape: Vec<i64> = shape.iter().map(|&side| side as i64).collect();
    Ok(Tensor::f_from_slice(values)?.f_view(shape.as_slice())?)
}

/// The values of a tensor of any float kind, row-major.
///
/// # Errors
/// What libtorch reports.
pub fn to_vec(tensor: &Tensor) -> Result<Vec<f32>, InteropError> {
    let flat = tensor.detach().f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
    Ok(Vec::<f32>::try_from(flat.f_view([-1])?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_precision_value_widens_exactly_and_comes_back() {
        for dtype in [Dtype::F16, Dtype::BF16] {
            let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let raw = RawTensor { dtype, shape: vec![1 << 16], bytes };
            let wide = raw.to_f32().unwrap();
            let kind = if dtype == Dtype::F16 { Kind::Half } else { Kind::BFloat16 };
            let torch = Tensor::from_data_size(&raw.bytes, &[1 << 16], kind).to_kind(Kind::Float);
            let torch = Vec::<f32>::try_from(torch).unwrap();
            let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan());
            assert!(wide.iter().zip(&torch).all(same));
            let back = encode(&wide, dtype);
            for (at, (a, b)) in raw.bytes.as_chunks::<2>().0.iter().zip(back.as_chunks::<2>().0).enumerate() {
                assert!(a == b || wide[at].is_nan(), "{dtype} {at:#06x}");
            }
        }
    }

    #[test]
    fn integers_and_doubles_are_rounded_to_nearest() {
        let of = |dtype, bytes: &[u8]| RawTensor { dtype, shape: vec![], bytes: bytes.to_vec() }.to_f32();
        assert_eq!(of(Dtype::F64, &0.1f64.to_le_bytes()), Ok(vec![0.1f32]));
        assert_eq!(of(Dtype::I64, &(-7i64).to_le_bytes()), Ok(vec![-7.0]));
        assert_eq!(of(Dtype::I8, &[0xff]), Ok(vec![-1.0]));
        assert!(of(Dtype::F8_E4M3, &[0]).unwrap_err().contains("F8_E4M3"));
    }
}
