//! The MPI calls of each operation.

use super::bf16::Bf16Ops;
use crate::call::{Call, Kind};
use crate::{CollectiveError, Dtype, ReduceOp};
use mpi::ffi;
use std::collections::VecDeque;
use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A communicator as this process sees it. Communicators are few and live until MPI is finalised.
#[derive(Clone, Copy)]
pub(super) struct Comm {
    handle: ffi::MPI_Comm,
    pub rank: usize,
    pub size: usize,
    /// Whether some of its ranks share no memory: the same answer on all of them.
    spans_nodes: bool,
}

// SAFETY: a handle is a name; only the progress thread makes calls with it.
unsafe impl Send for Comm {}
// SAFETY: as above.
unsafe impl Sync for Comm {}

impl Comm {
    /// All ranks, who call this together; MPI must be initialised.
    pub fn world() -> Result<Self, CollectiveError> {
        // SAFETY: a constant of the initialised library.
        Self::of(unsafe { ffi::RSMPI_COMM_WORLD })
    }

    /// All its ranks call this together.
    fn of(handle: ffi::MPI_Comm) -> Result<Self, CollectiveError> {
        let (mut rank, mut size, mut here) = (0, 0, 0);
        let mut node = MaybeUninit::uninit();
        // SAFETY: a valid communicator and valid out-pointers; the node's communicator is used only after success.
        unsafe {
            ffi::MPI_Comm_rank(handle, &mut rank);
            ffi::MPI_Comm_size(handle, &mut size);
            ffi::MPI_Comm_set_errhandler(handle, ffi::RSMPI_ERRORS_RETURN);
            let (shared, no_info) = (ffi::RSMPI_COMM_TYPE_SHARED, ffi::RSMPI_INFO_NULL);
            let code = ffi::MPI_Comm_split_type(handle, shared, 0, no_info, node.as_mut_ptr());
            check(rank as usize, code, "split")?;
            ffi::MPI_Comm_size(node.assume_init(), &mut here);
            ffi::MPI_Comm_free(node.as_mut_ptr());
        }
        Ok(Self { handle, rank: rank as usize, size: size as usize, spans_nodes: here < size })
    }

    /// Whether both are the same communicator.
    pub fn is(&self, other: &Self) -> bool {
        self.handle == other.handle
    }
}

/// The address that means "in place": 1 for Open MPI, -1 for MPICH and its kin.
pub(super) fn in_place() -> isize {
    if mpi::environment::library_version().is_ok_and(|version| version.contains("Open MPI")) { 1 } else { -1 }
}

/// Between nodes a message is at most so long: what is on the wire can be waited for piece by piece, and replies need not queue behind
/// long ones. Inside a node, where a message is one copy, it is not cut.
const PIECE_BYTES: usize = 128 << 10;

/// A piece of an operation on the wire.
#[derive(Default)]
pub(super) struct Transfer {
    /// What this rank sends, about.
    pub bytes: usize,
    requests: Vec<ffi::MPI_Request>,
    /// Freed when nothing uses them any more.
    types: Vec<ffi::MPI_Datatype>,
}

/// How to make the calls.
pub(super) struct Wire {
    /// In the whole run, for messages.
    pub rank: usize,
    pub chunk_numel: usize,
    pub in_place: isize,
    pub bf16: Bf16Ops,
}

impl Wire {
    /// The ranges of each rank's part that are moved one after the other, the same on all ranks; a barrier has an empty one.
    pub fn pieces(&self, comm: Comm, call: &Call) -> VecDeque<Range<usize>> {
        if call.kind == Kind::Barrier {
            return std::iter::once(0..0).collect();
        }
        // MPI multiplies counts and ranks as 32-bit numbers here and there.
        let longest = self.chunk_numel.clamp(1, i32::MAX as usize / comm.size);
        let longest = match call.kind {
            // Cut, it would be another algorithm.
            Kind::ReduceScatter(_) => longest,
            _ if comm.spans_nodes => longest.min(PIECE_BYTES / call.dtype.bytes()),
            _ => longest,
        };
        call.chunks(longest).collect()
    }

    /// Starts a piece of an operation, whose buffers are in use until [`Wire::is_done`]. All ranks have to start the pieces of a
    /// communicator in the same order.
    pub fn start(&self, comm: Comm, call: &Call, part: Range<usize>) -> Result<Transfer, CollectiveError> {
        let bytes = part.len() * call.dtype.bytes() * (comm.size - 1);
        let mut transfer = Transfer { bytes, ..Transfer::default() };
        self.start_piece(comm, call, part, &mut transfer)?;
        Ok(transfer)
    }

    /// SAFETY of all calls here: `call` has checked that its buffers are as long as the operation reaches and keeps them;
    /// `chunks` keeps counts below 2^31.
    fn start_piece(
        &self,
        comm: Comm,
        call: &Call,
        part: Range<usize>,
        transfer: &mut Transfer,
    ) -> Result<(), CollectiveError> {
        let (n, handle) = (call.numel, comm.handle);
        let (start, count, datatype) = (part.start, part.len() as i32, type_of(call.dtype));
        let here = self.in_place as *const c_void;
        let from = if call.in_place { here } else { call.from(start).cast_const().cast() };
        let to = call.to(start).cast();
        match call.kind {
            // SAFETY: a valid communicator; the request is written on success.
            Kind::Barrier => self.add(transfer, call, |request| unsafe { ffi::MPI_Ibarrier(handle, request) }),
            Kind::AllReduce(op) => {
                let op = self.operation(call.dtype, op);
                // SAFETY: see above.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Iallreduce(from, to, count, datatype, op, handle, request)
                })
            }
            Kind::ReduceScatter(op) if part.len() == n && !call.in_place => {
                let op = self.operation(call.dtype, op);
                // SAFETY: see above.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Ireduce_scatter_block(from, to, count, datatype, op, handle, request)
                })
            }
            // The pieces of a chunk do not lie together, so each is reduced to its owner by a call of its own.
            Kind::ReduceScatter(op) => (0..comm.size).try_for_each(|root| {
                let op = self.operation(call.dtype, op);
                let own = root == comm.rank;
                let piece = call.from(root * n + start).cast_const().cast();
                let from = if own && call.in_place { here } else { piece };
                let to = if own { to } else { std::ptr::null_mut() };
                // SAFETY: see above; only the root's `to` is written.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Ireduce(from, to, count, datatype, op, root as i32, handle, request)
                })
            }),
            Kind::AllGather if part.len() == n => {
                // SAFETY: see above.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Iallgather(from, count, datatype, to, count, datatype, handle, request)
                })
            }
            Kind::AllGather => {
                let strided = self.strided(call, count, transfer)?;
                // SAFETY: see above; the type steps from one rank's part to the next.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Iallgather(from, count, datatype, to, 1, strided, handle, request)
                })
            }
            Kind::AllToAll if part.len() == n => {
                // SAFETY: see above.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Ialltoall(from, count, datatype, to, count, datatype, handle, request)
                })
            }
            Kind::AllToAll => {
                let strided = self.strided(call, count, transfer)?;
                // SAFETY: see above; the type steps from one rank's part to the next.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Ialltoall(from, 1, strided, to, 1, strided, handle, request)
                })
            }
            Kind::Broadcast { root } => {
                // SAFETY: see above.
                self.add(transfer, call, |request| unsafe {
                    ffi::MPI_Ibcast(to, count, datatype, root as i32, handle, request)
                })
            }
        }
    }

    /// Makes one call and keeps its request.
    fn add(
        &self,
        transfer: &mut Transfer,
        call: &Call,
        start: impl FnOnce(*mut ffi::MPI_Request) -> i32,
    ) -> Result<(), CollectiveError> {
        let mut request = MaybeUninit::uninit();
        self.check(start(request.as_mut_ptr()), call.name)?;
        // SAFETY: a call that returned success has written the request.
        transfer.requests.push(unsafe { request.assume_init() });
        Ok(())
    }

    /// The type of `count` elements that lie as far apart as the parts of two ranks.
    fn strided(&self, call: &Call, count: i32, transfer: &mut Transfer) -> Result<ffi::MPI_Datatype, CollectiveError> {
        let extent = (call.numel * call.dtype.bytes()) as ffi::MPI_Aint;
        let (mut run, mut strided) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: each type is used only after the call that makes it has succeeded.
        unsafe {
            self.check(ffi::MPI_Type_contiguous(count, type_of(call.dtype), run.as_mut_ptr()), call.name)?;
            transfer.types.push(run.assume_init());
            let code = ffi::MPI_Type_create_resized(run.assume_init(), 0, extent, strided.as_mut_ptr());
            self.check(code, call.name)?;
            transfer.types.push(strided.assume_init());
            self.check(ffi::MPI_Type_commit(strided.as_mut_ptr()), call.name)?;
            Ok(strided.assume_init())
        }
    }

    /// Whether all of an operation is done.
    pub fn is_done(&self, transfer: &mut Transfer, op: &'static str) -> Result<bool, CollectiveError> {
        while let Some(request) = transfer.requests.last_mut() {
            let mut done = 0;
            // SAFETY: the request was started by this thread and has not completed yet.
            let code = unsafe { ffi::MPI_Test(request, &mut done, ffi::RSMPI_STATUS_IGNORE) };
            self.check(code, op)?;
            if done == 0 {
                return Ok(false);
            }
            transfer.requests.pop();
        }
        for mut datatype in transfer.types.drain(..) {
            // SAFETY: made by `strided`; what used it has completed.
            unsafe { ffi::MPI_Type_free(&mut datatype) };
        }
        Ok(true)
    }

    /// Blocks until all ranks of `comm` have come.
    pub fn split(&self, comm: Comm, color: i32, key: i32) -> Result<Comm, CollectiveError> {
        let mut group = MaybeUninit::uninit();
        // SAFETY: a valid communicator; the new one is read only after success.
        unsafe {
            self.check(ffi::MPI_Comm_split(comm.handle, color, key, group.as_mut_ptr()), "split")?;
            Comm::of(group.assume_init())
        }
    }

    fn operation(&self, dtype: Dtype, op: ReduceOp) -> ffi::MPI_Op {
        // SAFETY: constants of the initialised library.
        unsafe {
            match (dtype, op) {
                (Dtype::Bf16, op) => self.bf16.of(op),
                (_, ReduceOp::Sum) => ffi::RSMPI_SUM,
                (_, ReduceOp::Max) => ffi::RSMPI_MAX,
                (_, ReduceOp::Min) => ffi::RSMPI_MIN,
            }
        }
    }

    fn check(&self, code: i32, op: &'static str) -> Result<(), CollectiveError> {
        check(self.rank, code, op)
    }
}

/// What a call returned, on rank `rank` of the run.
fn check(rank: usize, code: i32, op: &'static str) -> Result<(), CollectiveError> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0u8; 512];
    let mut length = 0;
    // SAFETY: the buffer is larger than MPI_MAX_ERROR_STRING (256 in Open MPI, 512 in MPICH).
    unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast(), &mut length) };
    let reason = String::from_utf8_lossy(&text[..length.max(0) as usize]).into_owned();
    Err(CollectiveError::Backend { rank, op, reason })
}

/// The MPI type that moves elements of `dtype`; bf16 travels as 16-bit words.
fn type_of(dtype: Dtype) -> ffi::MPI_Datatype {
    // SAFETY: constants of the initialised library.
    unsafe {
        match dtype {
            Dtype::F32 => ffi::RSMPI_FLOAT,
            Dtype::F64 => ffi::RSMPI_DOUBLE,
            Dtype::Bf16 => ffi::RSMPI_UINT16_T,
            Dtype::I64 => ffi::RSMPI_INT64_T,
            Dtype::U8 => ffi::RSMPI_UINT8_T,
        }
    }
}
