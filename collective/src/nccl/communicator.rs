//! The NCCL calls: making and ending communicators, and those of each operation.

use super::driver::{Device, Event, Stream};
use crate::call::{Call, Kind};
use crate::{Dtype, ReduceOp};
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t, ncclResult_t};
use std::ffi::{CStr, c_int};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A unique id as it is handed round.
pub(super) const ID_BYTES: usize = 128;

/// The id of a new communicator, made by its rank 0.
pub(super) fn unique_id() -> Result<[u8; ID_BYTES], String> {
    let mut id = sys::ncclUniqueId { internal: [0; ID_BYTES] };
    // SAFETY: a valid out-pointer.
    checked("ncclGetUniqueId", std::ptr::null_mut(), unsafe { sys::ncclGetUniqueId(&mut id) })?;
    Ok(id.internal.map(|byte| byte as u8))
}

/// How far a communicator is with what it was asked last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Ready for the next call.
    Ready,
    /// Still at it; only the state may be asked for.
    InProgress,
}

/// Ranks that exchange device memory, with a stream of their own. Only the progress thread has it.
pub(super) struct Communicator {
    /// NCCL's own thread may write it after the call that begins to make it.
    handle: Box<AtomicPtr<sys::ncclComm>>,
    size: usize,
    pub stream: Stream,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Begins to join the communicator of `id`; it can be used when [`Communicator::state`] says so.
    pub fn join(device: &Arc<Device>, id: [u8; ID_BYTES], rank: usize, size: usize) -> Result<Self, String> {
        let id = sys::ncclUniqueId { internal: id.map(|byte| byte as std::ffi::c_char) };
        let (mut config, new) = (non_blocking(), Self::empty(device, size)?);
        // SAFETY: valid pointers, the first for as long as the communicator lives; the config is copied before the call
        // returns.
        let init = || unsafe {
            let result =
                sys::ncclCommInitRankConfig(new.handle.as_ptr(), size as c_int, id, rank as c_int, &mut config);
            checked("ncclCommInitRankConfig", std::ptr::null_mut(), result)
        };
        device.within(init)?;
        Ok(new)
    }

    /// Begins to make the communicator of those that pass the same color. Both can be used when both states say so.
    pub fn split(&self, device: &Arc<Device>, color: i32, key: i32, size: usize) -> Result<Self, String> {
        let (mut config, new) = (non_blocking(), Self::empty(device, size)?);
        // SAFETY: a live communicator and valid pointers; else as in `join`.
        let split = || unsafe {
            let result = sys::ncclCommSplit(self.handle(), color, key, new.handle.as_ptr(), &mut config);
            checked("ncclCommSplit", self.handle(), result)
        };
        device.within(split)?;
        Ok(new)
    }

    fn empty(device: &Arc<Device>, size: usize) -> Result<Self, String> {
        Ok(Self { handle: Box::default(), size, stream: Stream::new(device)? })
    }

    fn handle(&self) -> sys::ncclComm_t {
        self.handle.load(Ordering::Acquire)
    }

    /// What the communicator is at, or the error that befell it since.
    pub fn state(&self) -> Result<State, String> {
        let (handle, mut state) = (self.handle(), ncclResult_t::ncclSuccess);
        if handle.is_null() {
            return Ok(State::InProgress);
        }
        // SAFETY: a live communicator and a valid out-pointer.
        checked("ncclCommGetAsyncError", handle, unsafe { sys::ncclCommGetAsyncError(handle, &mut state) })?;
        checked("NCCL reports", handle, state)
    }

    /// Puts an operation on the stream, after `ready`. It is there when [`Communicator::state`] says so.
    pub fn launch(&self, call: &Call, ready: &Event, chunk_numel: usize) -> Result<State, String> {
        ready.delay(self.stream.handle())?;
        // SAFETY: opens a group of this thread, which is closed below whatever happens in between.
        checked("ncclGroupStart", self.handle(), unsafe { sys::ncclGroupStart() })?;
        let mut chunks = call.chunks(chunk_numel.max(1));
        let added = chunks.try_for_each(|part| self.add(call, part));
        // SAFETY: closes the group.
        let closed = checked("ncclGroupEnd", self.handle(), unsafe { sys::ncclGroupEnd() });
        added.and(closed)
    }

    /// SAFETY of all calls here: `call` has checked that its buffers, on this communicator's device, are as long as the
    /// operation reaches, and whoever launches keeps them until the stream has passed the operation.
    fn add(&self, call: &Call, part: Range<usize>) -> Result<(), String> {
        let (comm, stream, n) = (self.handle(), self.stream.handle().0.cast(), call.numel);
        let (start, count, datatype) = (part.start, part.len(), type_of(call.dtype));
        let from = |index: usize| call.from(index).cast_const().cast();
        let to = |index: usize| call.to(index).cast();
        let whole = count == n;
        let each = |call: &mut dyn FnMut(usize) -> Result<(), String>| (0..self.size).try_for_each(call);
        let checked = |function: &str, result: ncclResult_t| checked(function, comm, result).map(|_| ());
        match call.kind {
            // The control plane's.
            Kind::Barrier => Ok(()),
            Kind::AllReduce(op) => {
                // SAFETY: see above.
                let result =
                    unsafe { sys::ncclAllReduce(from(start), to(start), count, datatype, operation(op), comm, stream) };
                checked("ncclAllReduce", result)
            }
            Kind::ReduceScatter(op) if whole => {
                // SAFETY: see above.
                let result =
                    unsafe { sys::ncclReduceScatter(from(0), to(0), count, datatype, operation(op), comm, stream) };
                checked("ncclReduceScatter", result)
            }
            // The pieces of a chunk do not lie together.
            Kind::ReduceScatter(op) => each(&mut |root| {
                let (piece, op) = (from(root * n + start), operation(op));
                // SAFETY: see above; only the root's `to` is written.
                let result =
                    unsafe { sys::ncclReduce(piece, to(start), count, datatype, op, root as c_int, comm, stream) };
                checked("ncclReduce", result)
            }),
            Kind::AllGather if whole => {
                // SAFETY: see above.
                let result = unsafe { sys::ncclAllGather(from(0), to(0), count, datatype, comm, stream) };
                checked("ncclAllGather", result)
            }
            Kind::AllGather => each(&mut |root| {
                // SAFETY: see above; only the root's `from` is read.
                let result = unsafe {
                    sys::ncclBroadcast(from(start), to(root * n + start), count, datatype, root as c_int, comm, stream)
                };
                checked("ncclBroadcast", result)
            }),
            Kind::AllToAll => each(&mut |peer| {
                let at = peer * n + start;
                // SAFETY: see above.
                unsafe {
                    checked("ncclSend", sys::ncclSend(from(at), count, datatype, peer as c_int, comm, stream))?;
                    checked("ncclRecv", sys::ncclRecv(to(at), count, datatype, peer as c_int, comm, stream))
                }
            }),
            Kind::Broadcast { root } => {
                // SAFETY: see above.
                let result =
                    unsafe { sys::ncclBroadcast(from(start), to(start), count, datatype, root as c_int, comm, stream) };
                checked("ncclBroadcast", result)
            }
        }
    }

    /// Ends what is on the wire, so that the kernels that wait for other ranks leave the device.
    pub fn abort(self) -> Result<(), String> {
        let handle = self.handle();
        if handle.is_null() {
            // NCCL may still be making it, and write where it was told to.
            std::mem::forget(self);
            return Ok(());
        }
        // SAFETY: a live communicator, which is gone afterwards.
        checked("ncclCommAbort", std::ptr::null_mut(), unsafe { sys::ncclCommAbort(handle) }).map(|_| ())
    }

    /// Begins the end of a communicator that nothing uses any more; [`Communicator::destroy`] it when its state is ready.
    pub fn finalize(&self) -> Result<State, String> {
        // SAFETY: a live communicator.
        checked("ncclCommFinalize", self.handle(), unsafe { sys::ncclCommFinalize(self.handle()) })
    }

    /// Frees it.
    pub fn destroy(self) -> Result<(), String> {
        // SAFETY: a finalised communicator, which is gone afterwards.
        checked("ncclCommDestroy", std::ptr::null_mut(), unsafe { sys::ncclCommDestroy(self.handle()) }).map(|_| ())
    }
}

/// Calls return at once, and can be aborted when other ranks do not come.
fn non_blocking() -> sys::ncclConfig_t {
    /// What the library takes for "not set", and what marks the structure, in its header.
    const UNSET: c_int = c_int::MIN;
    const MAGIC: u32 = 0xcafe_beef;
    sys::ncclConfig_t {
        size: size_of::<sys::ncclConfig_t>(),
        magic: MAGIC,
        version: 22900,
        blocking: 0,
        cgaClusterSize: UNSET,
        minCTAs: UNSET,
        maxCTAs: UNSET,
        netName: std::ptr::null(),
        splitShare: UNSET,
        trafficClass: UNSET,
        commName: std::ptr::null(),
        collnetEnable: UNSET,
        CTAPolicy: UNSET,
        shrinkShare: UNSET,
        nvlsCTAs: UNSET,
        nChannelsPerNetPeer: UNSET,
        nvlinkCentricSched: UNSET,
        graphUsageMode: UNSET,
        numRmaCtx: UNSET,
    }
}

/// Turns NCCL's answer into what it says.
fn checked(function: &str, comm: sys::ncclComm_t, result: ncclResult_t) -> Result<State, String> {
    match result {
        ncclResult_t::ncclSuccess => Ok(State::Ready),
        ncclResult_t::ncclInProgress => Ok(State::InProgress),
        _ => {
            // SAFETY: both give constants or texts that the library owns, or null.
            let (name, last) = unsafe { (text(sys::ncclGetErrorString(result)), text(sys::ncclGetLastError(comm))) };
            Err(if last.is_empty() { format!("{function}: {name}") } else { format!("{function}: {name}: {last}") })
        }
    }
}

/// # Safety
/// Null or a text that ends with a zero.
unsafe fn text(pointer: *const std::ffi::c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().trim().to_owned()
}

fn type_of(dtype: Dtype) -> ncclDataType_t {
    match dtype {
        Dtype::F32 => ncclDataType_t::ncclFloat32,
        Dtype::F64 => ncclDataType_t::ncclFloat64,
        Dtype::Bf16 => ncclDataType_t::ncclBfloat16,
        Dtype::I64 => ncclDataType_t::ncclInt64,
        Dtype::U8 => ncclDataType_t::ncclUint8,
    }
}

fn operation(op: ReduceOp) -> ncclRedOp_t {
    match op {
        ReduceOp::Sum => ncclRedOp_t::ncclSum,
        ReduceOp::Max => ncclRedOp_t::ncclMax,
        ReduceOp::Min => ncclRedOp_t::ncclMin,
    }
}
