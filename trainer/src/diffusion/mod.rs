//! Diffusion processes and training objectives.

mod objective;
mod prediction;
mod respace;
mod tables;
mod vlb;

pub use objective::{LossTerms, Noised, Objective, VariationalEps};
pub use prediction::{Prediction, Process};
pub use respace::{Respacing, RespacingError};
pub use tables::{Schedule, Tables};
pub(crate) use vlb::learned_log_variance;
pub use vlb::{VarianceTerms, variational_bound};
