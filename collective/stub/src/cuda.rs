//! The functions of libcuda that the backend and its tests call.
//!
//! SAFETY of all functions here: callers keep to the driver's manual; handles are those that this library gave out.
#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use crate::log::{Fault, call, fault};
use crate::stream::{Event, Stream};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

const SUCCESS: c_int = 0;
const INVALID_VALUE: c_int = 1;
const INVALID_CONTEXT: c_int = 201;
const NOT_READY: c_int = 600;

thread_local! {
    static CONTEXTS: std::cell::RefCell<Vec<*mut c_void>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn answer(function: &str, line: String) -> c_int {
    call(&line);
    if fault(function) == Some(Fault::Fail) { INVALID_VALUE } else { SUCCESS }
}

fn has_context() -> bool {
    CONTEXTS.with_borrow(|contexts| !contexts.is_empty())
}

fn numbered(kind: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    format!("{kind}{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// The stream that a handle stands for.
///
/// # Safety
/// Null or a handle that is not destroyed.
pub unsafe fn stream(handle: *mut c_void) -> Arc<Stream> {
    if handle.is_null() {
        return Stream::default_stream();
    }
    // SAFETY: the caller's promise; handles are Arcs of streams.
    unsafe {
        Arc::increment_strong_count(handle.cast::<Stream>());
        Arc::from_raw(handle.cast::<Stream>())
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn cuInit(_: c_uint) -> c_int {
    answer("cuInit", "cuInit".to_owned())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> c_int {
    let devices = std::env::var("DITHAROS_STUB_DEVICES").ok().and_then(|count| count.parse().ok());
    // SAFETY: see above.
    unsafe { *count = devices.unwrap_or(8) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> c_int {
    // SAFETY: see above.
    unsafe { *device = ordinal };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, length: c_int, device: c_int) -> c_int {
    let id = format!("0000:{device:02x}:00.0\0");
    assert!(id.len() <= length as usize);
    // SAFETY: see above; it fits, as just seen.
    unsafe { std::ptr::copy_nonoverlapping(id.as_ptr().cast(), text, id.len()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> c_int {
    // SAFETY: see above.
    unsafe { *context = (device as usize + 1) as *mut c_void };
    answer("cuDevicePrimaryCtxRetain", format!("cuDevicePrimaryCtxRetain {device}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> c_int {
    answer("cuDevicePrimaryCtxRelease", format!("cuDevicePrimaryCtxRelease {device}"))
}

#[unsafe(no_mangle)]
pub extern "C" fn cuCtxPushCurrent_v2(context: *mut c_void) -> c_int {
    CONTEXTS.with_borrow_mut(|contexts| contexts.push(context));
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> c_int {
    match CONTEXTS.with_borrow_mut(Vec::pop) {
        Some(popped) => {
            // SAFETY: see above.
            unsafe { *context = popped };
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(error: c_int, name: *mut *const c_char) -> c_int {
    let text = match error {
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        _ => c"CUDA_ERROR_UNKNOWN",
    };
    // SAFETY: see above.
    unsafe { *name = text.as_ptr() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamCreate(handle: *mut *mut c_void, flags: c_uint) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    let stream = Stream::new(numbered("stream"));
    let line = format!("cuStreamCreate {} flags={flags}", stream.name);
    // SAFETY: see above.
    unsafe { *handle = Arc::into_raw(stream).cast_mut().cast() };
    answer("cuStreamCreate", line)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamDestroy_v2(handle: *mut c_void) -> c_int {
    // SAFETY: see above.
    let stream = unsafe { Arc::from_raw(handle.cast::<Stream>()) };
    answer("cuStreamDestroy", format!("cuStreamDestroy {}", stream.name))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamSynchronize(handle: *mut c_void) -> c_int {
    // SAFETY: see above.
    unsafe { stream(handle) }.synchronize();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamWaitEvent(handle: *mut c_void, event: *mut c_void, _: c_uint) -> c_int {
    // SAFETY: see above.
    let (stream, event) = unsafe { (stream(handle), self::event(event)) };
    event.delay(&stream);
    answer("cuStreamWaitEvent", format!("cuStreamWaitEvent {} {}", stream.name, event.name))
}

unsafe fn event(handle: *mut c_void) -> Arc<Event> {
    // SAFETY: see above; handles are Arcs of events.
    unsafe {
        Arc::increment_strong_count(handle.cast::<Event>());
        Arc::from_raw(handle.cast::<Event>())
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventCreate(handle: *mut *mut c_void, _: c_uint) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    // SAFETY: see above.
    unsafe { *handle = Arc::into_raw(Event::new(numbered("event"))).cast_mut().cast() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventDestroy_v2(handle: *mut c_void) -> c_int {
    // SAFETY: see above.
    drop(unsafe { Arc::from_raw(handle.cast::<Event>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventRecord(handle: *mut c_void, on: *mut c_void) -> c_int {
    if !has_context() {
        return INVALID_CONTEXT;
    }
    // SAFETY: see above.
    let (event, stream) = unsafe { (event(handle), stream(on)) };
    event.record(&stream);
    answer("cuEventRecord", format!("cuEventRecord {} {}", event.name, stream.name))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuEventQuery(handle: *mut c_void) -> c_int {
    // SAFETY: see above.
    if unsafe { event(handle) }.is_reached() { SUCCESS } else { NOT_READY }
}

/// Sizes of what is allocated.
static ALLOCATED: Mutex<Option<HashMap<usize, Layout>>> = Mutex::new(None);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(pointer: *mut u64, bytes: usize) -> c_int {
    let Ok(layout) = Layout::from_size_align(bytes, 256) else { return INVALID_VALUE };
    if bytes == 0 || !has_context() {
        return INVALID_VALUE;
    }
    // SAFETY: see above; the size is not zero. Filled with something that no test expects.
    unsafe {
        let memory = alloc(layout);
        memory.write_bytes(0xa5, bytes);
        *pointer = memory as u64;
        ALLOCATED.lock().expect("stub").get_or_insert_default().insert(memory as usize, layout);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemFree_v2(pointer: u64) -> c_int {
    match ALLOCATED.lock().expect("stub").get_or_insert_default().remove(&(pointer as usize)) {
        // SAFETY: allocated above with this layout. Overwritten first, so that late reads show.
        Some(layout) => unsafe {
            (pointer as *mut u8).write_bytes(0x5a, layout.size());
            dealloc(pointer as *mut u8, layout);
            SUCCESS
        },
        None => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) -> c_int {
    Stream::default_stream().synchronize();
    // SAFETY: see above.
    unsafe { std::ptr::copy_nonoverlapping(from.cast::<u8>(), to as *mut u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) -> c_int {
    Stream::default_stream().synchronize();
    // SAFETY: see above.
    unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to.cast::<u8>(), bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemsetD32Async(to: u64, value: c_uint, count: usize, on: *mut c_void) -> c_int {
    // SAFETY: see above; callers keep the memory until the stream has passed this.
    let fill = move || unsafe { std::slice::from_raw_parts_mut(to as *mut c_uint, count) }.fill(value);
    // SAFETY: see above.
    unsafe { stream(on) }.push(fill);
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchHostFunc(
    on: *mut c_void,
    function: unsafe extern "C" fn(*mut c_void),
    data: *mut c_void,
) -> c_int {
    let data = data as usize;
    // SAFETY: see above; callers keep what the function uses.
    unsafe { stream(on).push(move || function(data as *mut c_void)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, on: *mut c_void) -> c_int {
    let to = to as usize;
    // SAFETY: see above; callers keep both until the stream has passed this.
    let copy = move || unsafe { std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes) };
    // SAFETY: see above.
    unsafe { stream(on) }.push(copy);
    SUCCESS
}
