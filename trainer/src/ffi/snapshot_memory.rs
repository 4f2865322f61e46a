use super::{TorchError, checked, ditharos_copy, ditharos_snapshot_memory};
use std::ops::Range;
use std::sync::Mutex;
use tch::{Device, Kind, Tensor};

/// Elements that a thread copies at a time (32 MiB): memcpy passes the caches by only when it is given more than they hold.
const COPY_NUMEL: usize = 8 << 20;

/// Float32 values in host memory that is made once and filled again and again; page-locked where `device` is a GPU, so
/// that the device copies by itself.
pub struct SnapshotMemory {
    values: Tensor,
    device: Device,
}

// SAFETY: through a shared reference the values are only read, and the tensor's own (atomic) reference count is the
// only other thing that changes.
unsafe impl Sync for SnapshotMemory {}

impl SnapshotMemory {
    /// Memory for `numel` values of tensors on `device`.
    ///
    /// # Errors
    /// What libtorch reports: not enough memory, or not enough that may be locked.
    pub fn allocate(numel: usize, device: Device) -> Result<Self, TorchError> {
        let mut values = std::ptr::null_mut();
        // SAFETY: `values` receives an owned tensor unless there is a message.
        checked(unsafe { ditharos_snapshot_memory(numel as i64, device != Device::Cpu, &mut values) })?;
        // SAFETY: see above.
        let values = unsafe { Tensor::from_ptr(values) };
        Ok(Self { values, device })
    }

    /// Copies flat float32 tensors on the device, end to end; together they have as many elements as this memory. Waits
    /// for the device once, and uses as many threads on the CPU as libtorch does.
    ///
    /// # Errors
    /// What the device reports.
    ///
    /// # Panics
    /// When the tensors are of another kind, place or length: that is a mistake in this crate.
    pub fn fill(&mut self, sources: &[Tensor]) -> Result<(), TorchError> {
        let numel: usize = sources.iter().map(Tensor::numel).sum();
        assert_eq!(numel, self.values.numel(), "the sources fill the memory");
        match self.device {
            Device::Cpu => self.fill_on_cpu(sources),
            device => {
                let mut start = 0;
                for source in sources {
                    let mut target = self.values.narrow(0, start, source.numel() as i64);
                    start += source.numel() as i64;
                    // SAFETY: two live tensors; the memory outlives the copy, which is waited for below.
                    checked(unsafe { ditharos_copy(target.as_mut_ptr(), source.as_ptr()) })?;
                }
                if let Device::Cuda(index) = device {
                    tch::Cuda::synchronize(index as i64);
                }
                Ok(())
            }
        }
    }

    fn fill_on_cpu(&mut self, sources: &[Tensor]) -> Result<(), TorchError> {
        let mut rest = values_mut(&mut self.values);
        let mut copies = Vec::with_capacity(sources.len());
        for source in sources {
            let (target, after) = rest.split_at_mut(source.numel());
            rest = after;
            copies.extend(target.chunks_mut(COPY_NUMEL).zip(values(source).chunks(COPY_NUMEL)));
        }
        // Plain memcpy: over so many bytes it passes the caches by, which libtorch's copy does not.
        let copies = Mutex::new(copies.into_iter());
        let next = || copies.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
        let work = || {
            while let Some((target, source)) = next() {
                target.copy_from_slice(source);
            }
        };
        std::thread::scope(|scope| {
            (1..tch::get_num_threads()).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        Ok(())
    }
}

impl AsRef<[f32]> for SnapshotMemory {
    fn as_ref(&self) -> &[f32] {
        values(&self.values)
    }
}

fn check(tensor: &Tensor) {
    let fits = tensor.is_contiguous() && tensor.kind() == Kind::Float && tensor.device() == Device::Cpu;
    assert!(fits, "values are contiguous float32 CPU memory");
}

fn values(tensor: &Tensor) -> &[f32] {
    check(tensor);
    // SAFETY: contiguous float32 CPU memory that the tensor keeps alive; the engine changes no tensor while it copies.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// Elements of a contiguous float32 tensor on the CPU, which a checkpoint is read into and nothing else touches meanwhile.
pub(crate) struct TensorTarget {
    /// Keeps the memory alive.
    tensor: Tensor,
    range: Range<usize>,
}

impl TensorTarget {
    /// `range` of the elements of `tensor`. Targets of one tensor do not overlap.
    pub fn new(tensor: &Tensor, range: Range<usize>) -> Self {
        Self { tensor: tensor.shallow_clone(), range }
    }
}

impl checkpoint::Target for TensorTarget {
    fn split_to(&mut self, numel: usize) -> Self {
        let start = self.range.start;
        self.range.start += numel;
        Self::new(&self.tensor, start..start + numel)
    }

    fn values_mut(&mut self) -> &mut [f32] {
        check(&self.tensor);
        let all = self.tensor.numel();
        let Range { start, end } = self.range;
        assert!(start <= end && end <= all, "elements {start} to {end} of a tensor of {all}");
        // SAFETY: inside contiguous float32 CPU memory that the tensor keeps alive; ranges of one tensor are disjoint, and
        // nothing else uses it before the read has ended (`restore_all`), or ever, where a read is left behind.
        unsafe { std::slice::from_raw_parts_mut(self.tensor.data_ptr().cast::<f32>().add(start), end - start) }
    }
}

/// The values of a contiguous float32 tensor on the CPU.
fn values_mut(tensor: &mut Tensor) -> &mut [f32] {
    check(tensor);
    // SAFETY: as in `values`; the caller has the only tensor of this storage that anybody reads or writes meanwhile.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), tensor.numel()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_filled_end_to_end_and_again() {
        let mut memory = SnapshotMemory::allocate(3 + 2 * COPY_NUMEL + 1, Device::Cpu).unwrap();
        let place = memory.as_ref().as_ptr();
        for factor in [1.0, -2.0] {
            let long = Tensor::arange(2 * COPY_NUMEL as i64 + 1, (Kind::Float, Device::Cpu)) * factor;
            let short = Tensor::from_slice(&[7f32, 8.0, 9.0]);
            memory.fill(&[short, long]).unwrap();
            assert_eq!(memory.as_ref()[..5], [7.0, 8.0, 9.0, 0.0, factor as f32]);
            assert_eq!(memory.as_ref().last(), Some(&(2.0 * COPY_NUMEL as f32 * factor as f32)));
        }
        assert_eq!(memory.as_ref().as_ptr(), place);
    }
}
