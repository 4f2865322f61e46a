//! The memory of micro-batches: aligned, perhaps page-locked, used again.

use std::fmt;

use bytemuck::{cast_slice, cast_slice_mut};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};

use crate::form::Dtype;

/// What the address of a buffer is a multiple of.
const ALIGN_BYTES: usize = 64;

/// A piece of host memory that stays where it is.
pub trait HostMemory: Send {
    /// All of it.
    fn bytes(&self) -> &[u8];
    /// All of it, to write to.
    fn bytes_mut(&mut self) -> &mut [u8];
}

/// Where the buffers of micro-batches come from: page-locked memory of a device's driver, for example.
pub trait HostAllocator: Send + Sync {
    /// At least `bytes` bytes at a multiple of 64, initialised.
    ///
    /// # Errors
    /// With the words for a message.
    fn allocate(&self, bytes: usize) -> Result<Box<dyn HostMemory>, String>;
}

/// Ordinary memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainMemory;

struct Plain {
    memory: Vec<u8>,
    start: usize,
}

impl Plain {
    fn zeroed(bytes: usize) -> Self {
        let memory = vec![0; bytes + ALIGN_BYTES - 1];
        // The address of a vector's numbers does not change while it does not grow.
        let start = memory.as_ptr().align_offset(ALIGN_BYTES);
        Self { memory, start }
    }
}

impl HostMemory for Plain {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.start..]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

impl HostAllocator for PlainMemory {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn HostMemory>, String> {
        Ok(Box::new(Plain::zeroed(bytes)))
    }
}

/// Latents in host memory, row after row, still to be multiplied by [`Latents::scale`]: in the number type of the files
/// where they are used as stored, as float32 where a posterior was sampled.
pub struct Latents {
    memory: Box<dyn HostMemory>,
    dtype: Dtype,
    numel: usize,
    scale: f32,
}

impl Latents {
    /// Room for `numel` numbers.
    ///
    /// # Errors
    /// If the allocator has no such memory, with the words for a message.
    pub fn allocate(allocator: &dyn HostAllocator, dtype: Dtype, numel: usize, scale: f32) -> Result<Self, String> {
        let bytes = numel * dtype.bytes();
        let memory = allocator.allocate(bytes)?;
        let (address, found) = (memory.bytes().as_ptr(), memory.bytes().len());
        if address.align_offset(ALIGN_BYTES) != 0 || found < bytes {
            return Err(format!(
                "the allocator gave {found} bytes at {address:p}; expected {bytes} at a multiple of {ALIGN_BYTES}"
            ));
        }
        Ok(Self { memory, dtype, numel, scale })
    }

    /// The same memory for other latents, if it is large enough.
    pub(crate) fn reuse(self, dtype: Dtype, numel: usize, scale: f32) -> Option<Self> {
        (self.memory.bytes().len() >= numel * dtype.bytes()).then_some(Self { dtype, numel, scale, ..self })
    }

    /// The number type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// How many numbers.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// What the numbers, widened to float32, are multiplied by (in float32) before the model sees them.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// The numbers in C order, in the byte order of this machine.
    pub fn bytes(&self) -> &[u8] {
        &self.memory.bytes()[..self.numel * self.dtype.bytes()]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory.bytes_mut()[..self.numel * self.dtype.bytes()]
    }

    /// The numbers, if they are float32.
    pub(crate) fn f32_mut(&mut self) -> Option<&mut [f32]> {
        (self.dtype == Dtype::F32).then(|| cast_slice_mut(self.bytes_mut()))
    }

    /// The numbers as the model sees them: widened and multiplied by the scale.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.numel];
        widen(self.dtype, self.bytes(), &mut numbers);
        numbers.iter_mut().for_each(|number| *number *= self.scale);
        numbers
    }
}

impl From<&[f32]> for Latents {
    /// Latents that are used as they are.
    fn from(numbers: &[f32]) -> Self {
        let bytes: &[u8] = cast_slice(numbers);
        let mut memory = Plain::zeroed(bytes.len());
        memory.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        Self { memory: Box::new(memory), dtype: Dtype::F32, numel: numbers.len(), scale: 1.0 }
    }
}

impl fmt::Debug for Latents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Latents({} × {}, scale {})", self.numel, self.dtype, self.scale)
    }
}

/// Widens numbers of this machine's byte order; `bytes` is aligned to the number type and as long as `out`.
pub(crate) fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F16 => cast_slice::<_, u16>(bytes).reinterpret_cast::<f16>().convert_to_f32_slice(out),
        Dtype::Bf16 => cast_slice::<_, u16>(bytes).reinterpret_cast::<bf16>().convert_to_f32_slice(out),
        Dtype::F32 => out.copy_from_slice(cast_slice(bytes)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn buffers_are_aligned_and_serve_smaller_needs_again() {
        for numel in [0, 1, 31, 4096] {
            let latents = Latents::allocate(&PlainMemory, Dtype::F16, numel, 1.0).unwrap();
            assert_eq!(latents.bytes().as_ptr().align_offset(64), 0);
            assert_eq!(latents.bytes().len(), numel * 2);
        }
        let latents = Latents::allocate(&PlainMemory, Dtype::F16, 100, 1.0).unwrap();
        let address = latents.bytes().as_ptr();
        let latents = latents.reuse(Dtype::F32, 50, 2.0).unwrap();
        assert_eq!((latents.bytes().as_ptr(), latents.bytes().len(), latents.scale()), (address, 200, 2.0));
        assert!(latents.reuse(Dtype::F32, 1000, 2.0).is_none());
    }

    #[test]
    fn an_allocator_that_gives_less_than_asked_is_refused() {
        struct Stingy;
        impl HostAllocator for Stingy {
            fn allocate(&self, _: usize) -> Result<Box<dyn HostMemory>, String> {
                Ok(Box::new(Plain { memory: vec![0; 128], start: 0 }))
            }
        }
        let error = Latents::allocate(&Stingy, Dtype::F32, 1000, 1.0).unwrap_err();
        assert!(error.contains("4000"), "{error}");
    }

    #[test]
    fn every_number_type_widens_exactly() {
        let numbers = [0.0f32, -1.5, 65504.0, 6.0e-8];
        let halves: Vec<u8> = numbers.iter().flat_map(|&number| f16::from_f32(number).to_ne_bytes()).collect();
        let mut latents = Latents::allocate(&PlainMemory, Dtype::F16, 4, 0.5).unwrap();
        latents.bytes_mut().copy_from_slice(&halves);
        assert_eq!(latents.to_f32(), numbers.map(|number| f16::from_f32(number).to_f32() * 0.5));
        let mut latents = latents.reuse(Dtype::Bf16, 4, 3.0).unwrap();
        for (pair, number) in latents.bytes_mut().chunks_mut(2).zip(numbers) {
            pair.copy_from_slice(&bf16::from_f32(number).to_ne_bytes());
        }
        assert_eq!(latents.to_f32(), numbers.map(|number| bf16::from_f32(number).to_f32() * 3.0));
        assert_eq!(Latents::from(&numbers[..]).to_f32(), numbers);
    }
}
