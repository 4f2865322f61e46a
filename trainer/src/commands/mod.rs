//! The trainer's commands.

pub mod bench_step;
pub mod digest;
pub mod sample;
pub mod source;
pub mod train;
