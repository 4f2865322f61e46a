//! The few things of the CUDA driver that collectives need, over device memory and streams that somebody else made.

use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// Turns a driver's answer into what it says.
pub(super) fn checked(function: &str, result: sys::CUresult) -> Result<(), String> {
    if result == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut name: *const c_char = std::ptr::null();
    // SAFETY: a valid out-pointer; the name is a constant of the library.
    let name = unsafe {
        sys::cuGetErrorName(result, &mut name);
        if name.is_null() { "an unknown error".into() } else { CStr::from_ptr(name).to_string_lossy() }
    };
    Err(format!("{function}: {name}"))
}

/// A GPU with its primary context, the one that libtorch uses too.
pub(super) struct Device {
    pub ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
}

// SAFETY: contexts may be used from any thread.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// The device that this process counts as `ordinal`. The libraries must be loaded.
    pub fn open(ordinal: usize) -> Result<Arc<Self>, String> {
        let (mut count, mut device, mut context) = (0, 0, std::ptr::null_mut());
        // SAFETY: valid out-pointers, in the order that the driver asks for.
        unsafe {
            checked("cuInit", sys::cuInit(0))?;
            checked("cuDeviceGetCount", sys::cuDeviceGetCount(&mut count))?;
            if ordinal >= count as usize {
                return Err(format!(
                    "there is no GPU {ordinal} for this rank: the driver shows {count} (look at CUDA_VISIBLE_DEVICES); start \
                     at most one rank per GPU"
                ));
            }
            checked("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal as c_int))?;
            checked("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
        }
        Ok(Arc::new(Self { ordinal, device, context }))
    }

    /// Its address on the bus, which no other GPU of the node has.
    pub fn bus_id(&self) -> Result<String, String> {
        let mut text = [0 as c_char; 32];
        // SAFETY: the buffer has the length given.
        let result = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr(), text.len() as c_int, self.device) };
        checked("cuDeviceGetPCIBusId", result)?;
        // SAFETY: the driver ends the text with a zero.
        Ok(unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Runs `work` with this device's context, and leaves this thread's own as it was.
    pub fn within<T>(&self, work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
        // SAFETY: a retained context.
        checked("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        let result = work();
        let mut context = std::ptr::null_mut();
        // SAFETY: what was pushed is on top again.
        checked("cuCtxPopCurrent", unsafe { sys::cuCtxPopCurrent_v2(&mut context) })?;
        result
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once by `open`. At the end of the process there is nobody to tell of an error.
        unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}

/// A stream that somebody else owns; null is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHandle(pub(super) sys::CUstream);

impl StreamHandle {
    /// Of the pointer that CUDA calls `cudaStream_t` or `CUstream`.
    pub fn from_raw(stream: *mut std::ffi::c_void) -> Self {
        Self(stream.cast())
    }
}

/// A stream of our own, which does not wait for the default stream.
pub(super) struct Stream {
    handle: sys::CUstream,
    device: Arc<Device>,
}

// SAFETY: streams may be used from any thread.
unsafe impl Send for Stream {}

impl Stream {
    pub fn new(device: &Arc<Device>) -> Result<Self, String> {
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let mut handle = std::ptr::null_mut();
        // SAFETY: a valid out-pointer.
        device.within(|| checked("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut handle, flags) }))?;
        Ok(Self { handle, device: device.clone() })
    }

    pub fn handle(&self) -> StreamHandle {
        StreamHandle(self.handle)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // SAFETY: made by `new`; work that is still on it goes on. Nobody is left to tell of an error.
        let _ = self.device.within(|| checked("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(self.handle) }));
    }
}

/// A point in a stream.
pub(super) struct Event {
    handle: sys::CUevent,
    device: Arc<Device>,
}

// SAFETY: events may be used from any thread.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

impl Event {
    /// After the work that is on `stream` now.
    pub fn on(device: &Arc<Device>, stream: StreamHandle) -> Result<Self, String> {
        let flags = sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32;
        device.within(|| {
            let mut handle = std::ptr::null_mut();
            // SAFETY: a valid out-pointer.
            checked("cuEventCreate", unsafe { sys::cuEventCreate(&mut handle, flags) })?;
            let event = Self { handle, device: device.clone() };
            // SAFETY: the event was just made; the stream is alive, says its owner.
            checked("cuEventRecord", unsafe { sys::cuEventRecord(handle, stream.0) })?;
            Ok(event)
        })
    }

    /// Whether that work is done.
    pub fn is_reached(&self) -> Result<bool, String> {
        // SAFETY: a live event.
        match unsafe { sys::cuEventQuery(self.handle) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => checked("cuEventQuery", result).map(|()| true),
        }
    }

    /// Lets what is put on `stream` from now on wait for it.
    pub fn delay(&self, stream: StreamHandle) -> Result<(), String> {
        // SAFETY: a live event; the stream is alive, says its owner.
        self.device.within(|| checked("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(stream.0, self.handle, 0) }))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `on`; an event that is still to be reached is freed then. Nobody is left to tell of an error.
        let _ = self.device.within(|| checked("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(self.handle) }));
    }
}

/// Memory of a device.
pub(super) struct DeviceBuffer {
    pointer: sys::CUdeviceptr,
    device: Arc<Device>,
}

impl DeviceBuffer {
    /// `bytes` (at least one is allocated) with nothing in it yet.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, String> {
        let mut pointer = MaybeUninit::uninit();
        // SAFETY: the out-pointer is written on success.
        let pointer = device.within(|| unsafe {
            checked("cuMemAlloc", sys::cuMemAlloc_v2(pointer.as_mut_ptr(), bytes.max(1)))?;
            Ok(pointer.assume_init())
        })?;
        Ok(Self { pointer, device: device.clone() })
    }

    pub fn as_ptr(&self) -> *mut u8 {
        self.pointer as *mut u8
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: made by `new`. Nobody is left to tell of an error.
        let _ = self.device.within(|| checked("cuMemFree", unsafe { sys::cuMemFree_v2(self.pointer) }));
    }
}

/// Copies `bytes` from host to device and waits for it.
///
/// # Safety
/// Both are valid for `bytes`.
pub(super) unsafe fn upload(device: &Device, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), String> {
    // SAFETY: the caller's promise.
    device.within(|| checked("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(to as u64, from.cast(), bytes) }))
}

/// Copies `bytes` from device to host and waits for it.
///
/// # Safety
/// Both are valid for `bytes`.
pub(super) unsafe fn download(device: &Device, from: *const u8, to: *mut u8, bytes: usize) -> Result<(), String> {
    // SAFETY: the caller's promise.
    device.within(|| checked("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(to.cast(), from as u64, bytes) }))
}
