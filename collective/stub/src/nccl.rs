//! The functions of libnccl that the backend calls.
//!
//! SAFETY of all functions here: callers keep to NCCL's manual; handles are those that this library gave out.
#![allow(non_snake_case, clippy::missing_safety_doc, missing_docs)]

use crate::comm::{Comm, IN_PROGRESS, INTERNAL_ERROR, INVALID_USAGE, Kind, Operation, SUCCESS};
use crate::cuda::stream;
use crate::log::{Fault, call, fault};
use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

type Handle = *mut c_void;

/// Operations between the start and the end of a group, with communicator and stream.
struct Group {
    operations: Vec<Operation>,
    comm: Handle,
    stream: usize,
}

thread_local! {
    static GROUP: RefCell<Option<Group>> = const { RefCell::new(None) };
}

unsafe fn comm(handle: Handle) -> Arc<Comm> {
    // SAFETY: see above; handles are Arcs of communicators.
    unsafe {
        Arc::increment_strong_count(handle.cast::<Comm>());
        Arc::from_raw(handle.cast::<Comm>())
    }
}

fn handle(comm: Arc<Comm>) -> Handle {
    Arc::into_raw(comm).cast_mut().cast()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(version: *mut c_int) -> c_int {
    let told = std::env::var("DITHAROS_STUB_NCCL_VERSION").ok().and_then(|version| version.parse().ok());
    // SAFETY: see above.
    unsafe { *version = told.unwrap_or(22907) };
    SUCCESS
}

#[repr(C)]
pub struct UniqueId([u8; 128]);

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(id: *mut UniqueId) -> c_int {
    call("ncclGetUniqueId");
    let mut bytes = [0; 128];
    let text = format!("comm{}", std::process::id());
    bytes[..text.len()].copy_from_slice(text.as_bytes());
    // SAFETY: see above.
    unsafe { *id = UniqueId(bytes) };
    if fault("ncclGetUniqueId").is_some() { INTERNAL_ERROR } else { SUCCESS }
}

/// The beginning of `ncclConfig_t`.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    new: *mut Handle,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *const Config,
) -> c_int {
    // SAFETY: see above.
    let config = unsafe { &*config };
    call(&format!("ncclCommInitRankConfig rank={rank} of {size} blocking={}", config.blocking));
    if config.magic != 0xcafe_beef || config.size < size_of::<Config>() || config.version < 21400 {
        return INVALID_USAGE;
    }
    if fault("ncclCommInitRankConfig") == Some(Fault::Fail) {
        return INTERNAL_ERROR;
    }
    let text = String::from_utf8_lossy(&id.0);
    // SAFETY: see above.
    unsafe { *new = handle(Comm::join(text.trim_end_matches('\0').to_owned(), rank as usize, size as usize)) };
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommSplit(
    parent: Handle,
    color: c_int,
    key: c_int,
    new: *mut Handle,
    _: *const Config,
) -> c_int {
    // SAFETY: see above.
    let parent = unsafe { comm(parent) };
    call(&format!("ncclCommSplit color={color} key={key}"));
    if !parent.is_free("ncclCommSplit") {
        return INVALID_USAGE;
    }
    // As NCCL does, written by another thread, some time later.
    let new = new as usize;
    // SAFETY: the caller keeps the pointer until the split is done.
    let ready = move |child| unsafe { (*(new as *const AtomicPtr<c_void>)).store(handle(child), Ordering::Release) };
    parent.split(color, key, ready);
    IN_PROGRESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(handle: Handle, error: *mut c_int) -> c_int {
    // SAFETY: see above.
    unsafe { *error = comm(handle).state() };
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommAbort(handle: Handle) -> c_int {
    call("ncclCommAbort");
    // SAFETY: see above; this is the end of the handle.
    unsafe { Arc::from_raw(handle.cast::<Comm>()) }.abort();
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommFinalize(handle: Handle) -> c_int {
    call("ncclCommFinalize");
    // SAFETY: see above.
    if unsafe { comm(handle) }.is_free("ncclCommFinalize") { SUCCESS } else { INVALID_USAGE }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommDestroy(handle: Handle) -> c_int {
    call("ncclCommDestroy");
    // SAFETY: see above; this is the end of the handle.
    drop(unsafe { Arc::from_raw(handle.cast::<Comm>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(error: c_int) -> *const c_char {
    match error {
        0 => c"no error",
        3 => c"internal error",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        _ => c"unknown result code",
    }
    .as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_: Handle) -> *const c_char {
    c"said by the stub".as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> c_int {
    call("ncclGroupStart");
    GROUP.set(Some(Group { operations: Vec::new(), comm: std::ptr::null_mut(), stream: 0 }));
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> c_int {
    call("ncclGroupEnd");
    match GROUP.take() {
        None => INVALID_USAGE,
        Some(Group { operations, .. }) if operations.is_empty() => SUCCESS,
        // SAFETY: handles of the operations, which the caller keeps.
        Some(group) => unsafe { comm(group.comm).begin(stream(group.stream as *mut c_void), group.operations) },
    }
}

unsafe fn add(operation: Operation, communicator: Handle, on: *mut c_void) -> c_int {
    // SAFETY: see above.
    let (comm, stream) = unsafe { (comm(communicator), stream(on)) };
    let Operation { function, kind, count, dtype, .. } = operation;
    let peer = match kind {
        Kind::Send { peer } | Kind::Recv { peer } => format!(" peer={peer}"),
        Kind::Broadcast { root } | Kind::Reduce { root, .. } => format!(" root={root}"),
        _ => String::new(),
    };
    call(&format!("{function} count={count} type={dtype}{peer} {}", stream.name));
    if !comm.is_free(function) {
        return INVALID_USAGE;
    }
    let added = GROUP.with_borrow_mut(|group| match group {
        None => false,
        Some(group) => {
            (group.comm, group.stream) = (communicator, on as usize);
            group.operations.push(operation);
            true
        }
    });
    if added { SUCCESS } else { comm.begin(stream, vec![operation]) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllReduce(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let operation = Operation { function: "ncclAllReduce", kind: Kind::AllReduce { op }, from, to, count, dtype };
    // SAFETY: see above.
    unsafe { add(operation, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduceScatter(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    op: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::ReduceScatter { op };
    // SAFETY: see above.
    unsafe { add(Operation { function: "ncclReduceScatter", kind, from, to, count, dtype }, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclReduce(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    op: c_int,
    root: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Reduce { op, root: root as usize };
    // SAFETY: see above.
    unsafe { add(Operation { function: "ncclReduce", kind, from, to, count, dtype }, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclAllGather(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let operation = Operation { function: "ncclAllGather", kind: Kind::AllGather, from, to, count, dtype };
    // SAFETY: see above.
    unsafe { add(operation, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclBroadcast(
    from: usize,
    to: usize,
    count: usize,
    dtype: c_int,
    root: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Broadcast { root: root as usize };
    // SAFETY: see above.
    unsafe { add(Operation { function: "ncclBroadcast", kind, from, to, count, dtype }, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclSend(
    from: usize,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Send { peer: peer as usize };
    // SAFETY: see above.
    unsafe { add(Operation { function: "ncclSend", kind, from, to: 0, count, dtype }, comm, stream) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclRecv(
    to: usize,
    count: usize,
    dtype: c_int,
    peer: c_int,
    comm: Handle,
    stream: *mut c_void,
) -> c_int {
    let kind = Kind::Recv { peer: peer as usize };
    // SAFETY: see above.
    unsafe { add(Operation { function: "ncclRecv", kind, from: 0, to, count, dtype }, comm, stream) }
}
