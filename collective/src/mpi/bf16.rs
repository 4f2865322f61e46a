//! Reductions of bf16, which MPI does not know: operations of our own over 16-bit words.

use crate::reduce::fold;
use crate::{Dtype, ReduceOp};
use mpi::ffi;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;

/// One MPI operation for each way to reduce. An addition is rounded once (see [`fold`]); their order is MPI's, so sums of
/// three and more values may differ in the last bit between world sizes.
pub(super) struct Bf16Ops {
    sum: ffi::MPI_Op,
    max: ffi::MPI_Op,
    min: ffi::MPI_Op,
}

impl Bf16Ops {
    /// MPI must be initialised.
    pub fn new() -> Self {
        Self { sum: make(Some(sum)), max: make(Some(max)), min: make(Some(min)) }
    }

    pub fn of(&self, op: ReduceOp) -> ffi::MPI_Op {
        match op {
            ReduceOp::Sum => self.sum,
            ReduceOp::Max => self.max,
            ReduceOp::Min => self.min,
        }
    }
}

fn make(function: ffi::MPI_User_function) -> ffi::MPI_Op {
    let mut op = MaybeUninit::uninit();
    // SAFETY: a function of the type that MPI asks for, commutative; the out-pointer is valid and written on success,
    // and with MPI initialised there is no failure but lack of memory, which ends the program.
    unsafe {
        ffi::MPI_Op_create(function, 1, op.as_mut_ptr());
        op.assume_init()
    }
}

unsafe extern "C" fn sum(from: *mut c_void, into: *mut c_void, numel: *mut c_int, _: *mut ffi::MPI_Datatype) {
    // SAFETY: MPI's promise to a reduction over its 16-bit type: two arrays of that many of them.
    unsafe { fold(Dtype::Bf16, ReduceOp::Sum, from.cast(), into.cast(), *numel as usize) }
}

unsafe extern "C" fn max(from: *mut c_void, into: *mut c_void, numel: *mut c_int, _: *mut ffi::MPI_Datatype) {
    // SAFETY: as above.
    unsafe { fold(Dtype::Bf16, ReduceOp::Max, from.cast(), into.cast(), *numel as usize) }
}

unsafe extern "C" fn min(from: *mut c_void, into: *mut c_void, numel: *mut c_int, _: *mut ffi::MPI_Datatype) {
    // SAFETY: as above.
    unsafe { fold(Dtype::Bf16, ReduceOp::Min, from.cast(), into.cast(), *numel as usize) }
}
