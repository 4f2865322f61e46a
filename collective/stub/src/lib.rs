//! A STUB for tests, never shipped: one library that poses as NVIDIA's libcuda.so.1 and libnccl.so, so that the nccl backend can
//! be driven through its whole call sequence on a machine without a GPU.
//!
//! "Device" memory is host memory. Streams are threads that work off a queue, so that work really is asynchronous and a
//! forgotten event shows as wrong data. Ranks (processes or threads) exchange data through files in `DITHAROS_STUB_DIR`.
//! Communicators insist on what NCCL's manual demands: no call on one that is still in progress. An operation is put on its
//! stream only after a few polls of the state, as a real one may be.
//!
//! Each call is written to `DITHAROS_STUB_DIR/calls.RANK` (polls are not). `DITHAROS_STUB_FAULT=KIND:FUNCTION:RANK` breaks one
//! function on one rank: `fail` (it returns an error), `async` (it is reported as failed later), `hang` (it never ends).

mod comm;
mod cuda;
mod log;
mod nccl;
mod stream;
