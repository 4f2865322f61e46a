//! Reductions that this crate computes itself: bf16 over MPI, which has no such type.

use crate::{Dtype, ReduceOp};
use half::bf16;

/// `into[i] = into[i] ∘ from[i]`. A sum of bf16 is rounded once per addition, to the nearest, ties to even; the maximum or
/// minimum of a NaN and a number is the number.
///
/// # Safety
/// Both are valid for `numel` elements of `dtype`, aligned for it, and do not overlap.
pub(crate) unsafe fn fold(dtype: Dtype, op: ReduceOp, from: *const u8, into: *mut u8, numel: usize) {
    // SAFETY: the caller's promise.
    unsafe {
        match dtype {
            Dtype::F32 => fold_as(op, from.cast(), into.cast(), numel, |a, b| a + b, f32::max, f32::min),
            Dtype::F64 => fold_as(op, from.cast(), into.cast(), numel, |a, b| a + b, f64::max, f64::min),
            Dtype::I64 => fold_as(op, from.cast(), into.cast(), numel, i64::wrapping_add, i64::max, i64::min),
            Dtype::U8 => fold_as(op, from.cast(), into.cast(), numel, u8::wrapping_add, u8::max, u8::min),
            Dtype::Bf16 => fold_as(op, from.cast(), into.cast(), numel, |a, b| a + b, bf16::max, bf16::min),
        }
    }
}

/// # Safety
/// As [`fold`].
unsafe fn fold_as<T: Copy>(
    op: ReduceOp,
    from: *const T,
    into: *mut T,
    numel: usize,
    sum: impl Fn(T, T) -> T,
    max: impl Fn(T, T) -> T,
    min: impl Fn(T, T) -> T,
) {
    // SAFETY: the caller's promise.
    let (from, into) =
        unsafe { (std::slice::from_raw_parts(from, numel), std::slice::from_raw_parts_mut(into, numel)) };
    let pairs = into.iter_mut().zip(from);
    match op {
        ReduceOp::Sum => pairs.for_each(|(into, from)| *into = sum(*into, *from)),
        ReduceOp::Max => pairs.for_each(|(into, from)| *into = max(*into, *from)),
        ReduceOp::Min => pairs.for_each(|(into, from)| *into = min(*into, *from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_sums_are_rounded_once_per_addition_to_the_nearest_even() {
        // The step of bf16 at 256 is 2: 256 + 1 is a tie that stays at 256; 258 + 1 one that goes up to 260.
        let values = |values: [f32; 3]| values.map(bf16::from_f32);
        let (from, mut into) = (values([1.0, 1.0, 3.0]), values([256.0, 258.0, 256.0]));
        // SAFETY: arrays of three elements each.
        unsafe { fold(Dtype::Bf16, ReduceOp::Sum, from.as_ptr().cast(), into.as_mut_ptr().cast(), 3) };
        assert_eq!(into, values([256.0, 260.0, 260.0]));
    }
}
