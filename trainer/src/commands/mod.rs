//! The trainer's commands.

pub mod bench_checkpoint;
pub mod bench_step;
pub mod checkpoints;
pub mod digest;
pub mod doctor;
pub mod draws;
pub mod ema;
pub mod evaluate;
pub mod export;
pub mod import;
pub mod inspect;
pub mod preview;
pub mod ranks;
pub mod sample;
pub mod status;
pub mod train;
pub mod validate;

pub use crate::interop::run as source;
