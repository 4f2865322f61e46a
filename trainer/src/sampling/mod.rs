//! From noise to latents: samplers, guidance, and generation with keyed noise.
//!
//! A [`Sampler`] runs a whole chain. It asks the model through a [`Denoise`] function, which adds labels and guidance,
//! and takes noise from a function of the step number, so that the same sampler serves keyed generation and recorded
//! trajectories. A new sampler is a new file here, a name in [`configs::Sampler`] and a line in `build.rs`.

mod build;
mod chain;
mod ddim;
mod ddpm;
mod dopri5;
mod dpm_solver;
mod flow;
mod generate;
mod guidance;
mod runge_kutta;
mod stochastic;
#[cfg(test)]
mod tests;

pub use build::{SamplerOptions, SamplingError};
pub use chain::Chain;
pub use configs::{GuidedChannels, Sampler as SamplerKind};
pub use ddim::Ddim;
pub use ddpm::Ddpm;
pub use dopri5::Dopri5;
pub use dpm_solver::DpmSolver;
pub use generate::{Generator, SamplingOptions};
pub use guidance::{Guidance, forward_with_cfg};
pub use runge_kutta::{RungeKutta, Tableau};
pub use stochastic::{DiffusionForm, LastStep, StochasticFlow, StochasticMethod};

use tch::Tensor;

/// The time of a batch in a chain.
pub struct ModelTime {
    /// What the model reads, `[N]` float32.
    pub t: Tensor,
    /// How far from the data each sample is, as a share of the process: 1 is pure noise, 0 clean data.
    pub noise_levels: Vec<f64>,
}

/// The model as samplers see it.
///
/// # Shapes
/// x_t [N, C, H, W] → [N, C or 2C, H, W], the model's output as it is.
pub type Denoise<'a> = &'a dyn Fn(&Tensor, &ModelTime) -> Tensor;

/// What a chain has after one step.
pub struct Step<'a> {
    /// Steps made before this one.
    pub number: usize,
    /// The time that the model was given at the beginning of the step.
    pub t: f64,
    /// The state after the step.
    pub x: &'a Tensor,
    /// The clean latent that was predicted in this step, where the sampler predicts one.
    pub pred_xstart: Option<&'a Tensor>,
}

/// A way from noise to latents.
pub trait Sampler: Send + Sync {
    /// Runs the whole chain from `start`, which is pure noise. `noise` gives the Gaussian of step k, of the shape of
    /// `start`, and is called for the steps that need one only; `observe` sees every step.
    ///
    /// # Shapes
    /// `start` [N, C, H, W] float32 → the same.
    ///
    /// # Errors
    /// [`SamplingError`] when the chain cannot be brought to its end.
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError>;
}
