//! Diffusion processes and training objectives.

mod flow;
mod gaussian;
mod objective;
mod prediction;
mod respace;
mod schedule;
mod tables;
mod vlb;

pub use flow::{FlowMatching, TimestepSampling};
pub use gaussian::Gaussian;
pub use objective::{LossPart, LossTerms, Noised, Objective, SampleLosses, Time};
pub use prediction::{Prediction, Process};
pub use respace::{Respacing, RespacingError};
pub use schedule::{Schedule, zero_terminal_snr};
pub use tables::Tables;
pub use vlb::{VarianceTerms, learned_log_variance, variational_bound};
