//! What `tch` lacks, through a small C++ file over the same libtorch. The only `unsafe` code on tensors.

mod build_id;
mod host;
mod snapshot_memory;

pub use build_id::identity;
pub use host::{batch_memory, upload};
pub use snapshot_memory::SnapshotMemory;
pub(crate) use snapshot_memory::TensorTarget;

use collective::nccl::StreamHandle;
use collective::{Dtype, Place, Region};
use std::ffi::{CStr, c_char, c_int, c_void};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

#[derive(Debug, thiserror::Error)]
#[error("libtorch: {0}")]
/// What libtorch said; its message names shapes and operators.
pub struct TorchError(pub String);

unsafe extern "C" {
    fn ditharos_free(message: *mut c_char);
    fn ditharos_grad(
        outputs: *const *mut C_tensor,
        grad_outputs: *const *mut C_tensor,
        n_outputs: usize,
        inputs: *const *mut C_tensor,
        n_inputs: usize,
        grads: *mut *mut C_tensor,
    ) -> *mut c_char;
    fn ditharos_fused_adamw(
        params: *const *mut C_tensor,
        grads: *const *mut C_tensor,
        exp_avgs: *const *mut C_tensor,
        exp_avg_sqs: *const *mut C_tensor,
        count: usize,
        step: *mut C_tensor,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> *mut c_char;
    fn ditharos_foreach_lerp(
        tensors: *const *mut C_tensor,
        end: *const *mut C_tensor,
        count: usize,
        weight: f64,
    ) -> *mut c_char;
    fn ditharos_snapshot_memory(numel: i64, is_pinned: bool, memory: *mut *mut C_tensor) -> *mut c_char;
    fn ditharos_copy(target: *mut C_tensor, source: *const C_tensor) -> *mut c_char;
    fn ditharos_allocate_storage(tensor: *mut C_tensor) -> *mut c_char;
    fn ditharos_free_storage(tensor: *mut C_tensor) -> *mut c_char;
    fn ditharos_set_deterministic(tf32: bool) -> *mut c_char;
    fn ditharos_cpu_capability() -> *mut c_char;
    fn ditharos_load_cuda() -> *mut c_char;
    fn ditharos_current_stream(device: c_int, stream: *mut *mut c_void) -> *mut c_char;
}

fn checked(message: *mut c_char) -> Result<(), TorchError> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the C++ side returns a NUL-terminated string from strdup, which is freed once, here.
    unsafe {
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        ditharos_free(message);
        Err(TorchError(text))
    }
}

fn pointers<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Vec<*mut C_tensor> {
    tensors.into_iter().map(|tensor| tensor.as_ptr().cast_mut()).collect()
}

/// Gradients of `outputs`, weighted by `grad_outputs` (same shapes), with respect to `inputs`; the graph is freed.
/// `None` where an input does not take part.
///
/// # Errors
/// What autograd reports, for example a shape mismatch.
pub fn grad(
    outputs: &[&Tensor],
    grad_outputs: &[&Tensor],
    inputs: &[&Tensor],
) -> Result<Vec<Option<Tensor>>, TorchError> {
    assert_eq!(outputs.len(), grad_outputs.len(), "one output gradient per output");
    let (outs, gouts) = (pointers(outputs.iter().copied()), pointers(grad_outputs.iter().copied()));
    let ins = pointers(inputs.iter().copied());
    let mut grads = vec![std::ptr::null_mut(); ins.len()];
    // SAFETY: all arrays have the lengths given and hold live tensors; `grads` receives owned tensors or nulls.
    unsafe {
        let (outs, gouts, ins) = (outs.as_ptr(), gouts.as_ptr(), ins.as_ptr());
        checked(ditharos_grad(outs, gouts, outputs.len(), ins, inputs.len(), grads.as_mut_ptr()))?;
    }
    // SAFETY: a non-null pointer is a tensor that the C++ side allocated for us.
    let owned = |ptr: *mut C_tensor| (!ptr.is_null()).then(|| unsafe { Tensor::from_ptr(ptr) });
    Ok(grads.into_iter().map(owned).collect())
}

/// The gradient of a scalar with respect to `input`; the graph is freed.
///
/// # Errors
/// What autograd reports, or that `scalar` does not depend on `input`.
pub fn grad_of_scalar(scalar: &Tensor, input: &Tensor) -> Result<Tensor, TorchError> {
    let grads = grad(&[scalar], &[&scalar.ones_like()], &[input])?;
    grads.into_iter().flatten().next().ok_or_else(|| TorchError("the loss does not depend on the output".to_owned()))
}

/// The hyperparameters of one AdamW update.
#[derive(Clone, Copy, Debug)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
}

/// One span of elements with its gradient and moments, all one-dimensional, float32, of equal length.
pub struct AdamWSpan {
    /// Weights, updated.
    pub param: Tensor,
    /// Gradient, read.
    pub grad: Tensor,
    /// First moment, updated.
    pub exp_avg: Tensor,
    /// Second moment, updated.
    pub exp_avg_sq: Tensor,
}

/// PyTorch's fused AdamW on every span, each on its own; `step` (scalar float32) counts from 1.
///
/// # Errors
/// What libtorch reports.
pub fn fused_adamw(spans: &[AdamWSpan], step: &Tensor, hyper: AdamW) -> Result<(), TorchError> {
    let (params, grads) = (pointers(spans.iter().map(|s| &s.param)), pointers(spans.iter().map(|s| &s.grad)));
    let exp_avgs = pointers(spans.iter().map(|s| &s.exp_avg));
    let exp_avg_sqs = pointers(spans.iter().map(|s| &s.exp_avg_sq));
    // SAFETY: four arrays of `spans.len()` live tensors and one live scalar.
    checked(unsafe {
        ditharos_fused_adamw(
            params.as_ptr(),
            grads.as_ptr(),
            exp_avgs.as_ptr(),
            exp_avg_sqs.as_ptr(),
            spans.len(),
            step.as_ptr().cast_mut(),
            hyper.lr,
            hyper.beta1,
            hyper.beta2,
            hyper.eps,
            hyper.weight_decay,
        )
    })
}

/// `tensors[i] += weight · (end[i] − tensors[i])` for every i.
///
/// # Errors
/// What libtorch reports.
pub fn foreach_lerp(tensors: &[Tensor], end: &[Tensor], weight: f64) -> Result<(), TorchError> {
    assert_eq!(tensors.len(), end.len(), "one end per tensor");
    let (selfs, ends) = (pointers(tensors), pointers(end));
    // SAFETY: two arrays of equal length of live tensors.
    checked(unsafe { ditharos_foreach_lerp(selfs.as_ptr(), ends.as_ptr(), tensors.len(), weight) })
}

/// New memory, with undefined values, for `tensor` and all tensors that share its storage, after [`free_storage`].
///
/// # Errors
/// No memory, or the storage has some.
pub(crate) fn allocate_storage(tensor: &Tensor) -> Result<(), TorchError> {
    // SAFETY: a live tensor.
    checked(unsafe { ditharos_allocate_storage(tensor.as_ptr().cast_mut()) })
}

/// Takes the memory of `tensor`, which starts its storage, and of all tensors that share it away. They keep their shapes;
/// nobody may read or write them until [`allocate_storage`].
///
/// # Errors
/// What libtorch reports.
pub(crate) fn free_storage(tensor: &Tensor) -> Result<(), TorchError> {
    // SAFETY: a live tensor. No region of it is in use: the engine waits for what it gathers before it lets it go.
    checked(unsafe { ditharos_free_storage(tensor.as_ptr().cast_mut()) })
}

/// Makes libtorch use deterministic kernels only; an operator without one fails. With `tf32` GPUs may round the inputs of
/// float32 products to TF32.
///
/// # Errors
/// What libtorch reports.
pub fn set_deterministic(tf32: bool) -> Result<(), TorchError> {
    // SAFETY: no pointers.
    checked(unsafe { ditharos_set_deterministic(tf32) })
}

/// The vector instructions that libtorch's own CPU kernels use, such as `AVX512`.
pub fn cpu_capability() -> String {
    // SAFETY: no arguments; a NUL-terminated string from strdup, or null without memory, which is freed once, here.
    unsafe {
        let name = ditharos_cpu_capability();
        if name.is_null() {
            return String::new();
        }
        let text = CStr::from_ptr(name).to_string_lossy().into_owned();
        ditharos_free(name);
        text
    }
}

/// Maps libtorch's CUDA half where a driver is present.
///
/// # Errors
/// Why it is not there: no driver, or what the loader said.
pub fn load_cuda() -> Result<(), TorchError> {
    // SAFETY: no arguments; dlopen is safe to call from any thread.
    checked(unsafe { ditharos_load_cuda() })
}

/// The stream that this thread's work on GPU `ordinal` goes to.
///
/// # Errors
/// What libtorch reports, for example that its CUDA half is not there.
pub fn current_stream(ordinal: usize) -> Result<StreamHandle, TorchError> {
    let mut stream = std::ptr::null_mut();
    // SAFETY: a valid out-pointer.
    checked(unsafe { ditharos_current_stream(ordinal as c_int, &mut stream) })?;
    Ok(StreamHandle::from_raw(stream))
}

/// The memory of a contiguous float32 or bfloat16 tensor as a region that keeps its storage alive.
///
/// # Panics
/// When the tensor is not such memory of the CPU or a GPU: that is a mistake in this crate.
pub fn region(tensor: &Tensor) -> Region {
    assert!(tensor.is_contiguous(), "a region is contiguous memory");
    let dtype = match tensor.kind() {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::Bf16,
        other => panic!("no collective moves {other:?}"),
    };
    let place = match tensor.device() {
        Device::Cpu => Place::Host,
        Device::Cuda(ordinal) => Place::Device(ordinal),
        other => panic!("no collective reaches memory of {other:?}"),
    };
    let owner = Box::new(tensor.shallow_clone());
    // SAFETY: the shallow clone shares the storage and keeps it alive; callers leave the tensor alone until the
    // operation has completed (the step waits before it reads or writes a bucket).
    unsafe { Region::from_raw(tensor.data_ptr().cast(), tensor.numel(), dtype, place, owner) }
}

#[cfg(test)]
mod tests {
    #[test]
    fn without_a_gpu_there_is_no_stream_and_libtorch_says_why() {
        if !tch::Cuda::is_available() {
            let error = super::current_stream(0).unwrap_err().to_string();
            assert!(error.contains("libtorch: ") && error.contains("cuda"), "{error}");
        }
    }
}
