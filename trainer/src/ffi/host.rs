//! Host memory that libtorch reads: page-locked buffers for the data loader, and latents on their way to the device.

use data_loader::{Dtype, HostAllocator, HostMemory, Latents, PlainMemory};
use tch::{Device, Kind, Tensor};

/// The memory from which micro-batches go to `device`: page-locked for a GPU, so that the copy runs beside the computation.
pub fn batch_memory(device: Device) -> &'static dyn HostAllocator {
    match device {
        Device::Cuda(_) => &PageLocked,
        _ => &PlainMemory,
    }
}

struct PageLocked;

struct Locked(Tensor);

impl HostAllocator for PageLocked {
    fn allocate(&self, bytes: usize) -> Result<Box<dyn HostMemory>, String> {
        let plain = Tensor::zeros([bytes.max(1) as i64], (Kind::Uint8, Device::Cpu));
        let locked = plain.f_pin_memory(Device::Cuda(0)).map_err(|error| format!("page-locked memory: {error}"))?;
        Ok(Box::new(Locked(locked)))
    }
}

impl HostMemory for Locked {
    fn bytes(&self) -> &[u8] {
        // SAFETY: a contiguous tensor of initialised bytes on the host, which lives as long as the slice; nobody else has it.
        unsafe { std::slice::from_raw_parts(self.0.data_ptr().cast::<u8>(), self.0.numel()) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.0.data_ptr().cast::<u8>(), self.0.numel()) }
    }
}

/// `latents` as float32 `[…shape]` on `device`, scaled. Halves travel as halves; widening is exact and there is one
/// multiplication, so the bits are those of scaling on the host.
///
/// The copy to a GPU may still run on return: `latents` must stay as they are until the device has been waited for.
pub fn upload(latents: &Latents, shape: &[i64], device: Device) -> Tensor {
    let kind = match latents.dtype() {
        Dtype::F16 => Kind::Half,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F32 => Kind::Float,
    };
    let rows = latents.numel() as i64 / shape.iter().product::<i64>();
    let size: Vec<i64> = std::iter::once(rows).chain(shape.iter().copied()).collect();
    // SAFETY: a view of `numel` numbers of that kind, in C order and aligned, that is dropped in this function. A copy to a
    // GPU that goes on reads pageable memory before it returns, and locked memory under the rule above.
    let stored = unsafe { Tensor::from_blob(latents.bytes().as_ptr(), &size, &[], kind, Device::Cpu) };
    let on_the_way = if device.is_cuda() { kind } else { Kind::Float };
    let wide = stored.to_device_(device, on_the_way, true, true).to_kind(Kind::Float);
    if latents.scale() == 1.0 { wide } else { wide * f64::from(latents.scale()) }
}
