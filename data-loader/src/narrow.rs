//! From f32 to the number type that is stored.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::block::Numbers;

impl Numbers {
    /// Numbers that are there.
    pub fn len(&self) -> usize {
        match self {
            Self::F16(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
            Self::F32(numbers) => numbers.len(),
        }
    }

    /// How many bytes they take.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::F16(_) | Self::Bf16(_) => self.len() * 2,
            Self::F32(_) => self.len() * 4,
        }
    }

    /// Keeps the first `numel` numbers.
    pub fn truncate(&mut self, numel: usize) {
        match self {
            Self::F16(numbers) => numbers.truncate(numel),
            Self::Bf16(numbers) => numbers.truncate(numel),
            Self::F32(numbers) => numbers.truncate(numel),
        }
    }

    /// Appends `numbers`, rounded. `Err` with the position of the first that is not finite, or is not once it is rounded;
    /// nothing is appended then.
    pub fn narrow(&mut self, numbers: &[f32]) -> Result<(), usize> {
        let start = self.len();
        let bad = match self {
            Self::F16(halves) => {
                halves.resize(start + numbers.len(), f16::ZERO);
                halves[start..].convert_from_f32_slice(numbers);
                halves[start..].iter().position(|half| !half.is_finite())
            }
            Self::Bf16(halves) => {
                halves.resize(start + numbers.len(), bf16::ZERO);
                halves[start..].convert_from_f32_slice(numbers);
                halves[start..].iter().position(|half| !half.is_finite())
            }
            Self::F32(singles) => {
                singles.extend_from_slice(numbers);
                singles[start..].iter().position(|single| !single.is_finite())
            }
        };
        bad.map_or(Ok(()), |at| {
            self.truncate(start);
            Err(at)
        })
    }
}
