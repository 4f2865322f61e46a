//! Whether operations on a GPU take place between the work that was on the caller's stream before them and the work that came
//! on it afterwards, with no host that waits in between.

use collective::nccl::{CallerStream, NcclCollective, StreamHandle};
use collective::{Collective, Dtype, Place, ReduceOp, Region};
use cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

const NUMEL: usize = 1000;

/// Null, the default stream, for the suite.
static CALLER_STREAM: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

pub fn caller_stream() -> Arc<CallerStream> {
    Arc::new(|| Ok(StreamHandle::from_raw(CALLER_STREAM.load(Ordering::SeqCst))))
}

/// On a stream of its own: a pause, ones are written, they are reduced, the sums are copied to the host.
pub fn check(collective: &NcclCollective, ordinal: usize) -> Result<(), String> {
    let (mut context, mut stream, mut memory) = (std::ptr::null_mut(), std::ptr::null_mut(), 0);
    let mut found = vec![0f32; NUMEL];
    // SAFETY: the driver is loaded, a collective works with it; out-pointers are valid, and stream and memory live until
    // the process ends.
    unsafe {
        checked("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, ordinal as i32))?;
        checked("cuCtxPushCurrent", sys::cuCtxPushCurrent_v2(context))?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        checked("cuStreamCreate", sys::cuStreamCreate(&mut stream, flags))?;
        checked("cuMemAlloc", sys::cuMemAlloc_v2(&mut memory, NUMEL * size_of::<f32>()))?;
        CALLER_STREAM.store(stream.cast(), Ordering::SeqCst);
        checked("cuLaunchHostFunc", sys::cuLaunchHostFunc(stream, Some(pause), std::ptr::null_mut()))?;
        checked("cuMemsetD32Async", sys::cuMemsetD32Async(memory, 1f32.to_bits(), NUMEL, stream))?;
        let device = Place::Device(ordinal);
        let buffer = Region::from_raw(memory as *mut u8, NUMEL, Dtype::F32, device, Box::new(()));
        let pending = (collective as &dyn Collective).all_reduce(buffer, ReduceOp::Sum);
        let ordered = pending.and_then(|pending| pending.wait_on_stream(collective.deadline()));
        ordered.map_err(|error| error.to_string())?;
        let bytes = NUMEL * size_of::<f32>();
        checked("cuMemcpyDtoHAsync", sys::cuMemcpyDtoHAsync_v2(found.as_mut_ptr().cast(), memory, bytes, stream))?;
        checked("cuStreamSynchronize", sys::cuStreamSynchronize(stream))?;
    }
    let expected = vec![collective.world_size() as f32; NUMEL];
    if found != expected {
        return Err(format!("all_reduce in stream order: {} is first, expected {}", found[0], expected[0]));
    }
    Ok(())
}

unsafe extern "C" fn pause(_: *mut c_void) {
    std::thread::sleep(Duration::from_millis(100));
}

fn checked(function: &str, result: sys::CUresult) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(format!("{function}: {result:?}")) }
}
