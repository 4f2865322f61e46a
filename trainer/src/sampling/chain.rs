use super::ModelTime;
use crate::diffusion::{Prediction, Tables};
use tch::{Device, Tensor};

/// A chain of timesteps of a Gaussian diffusion, and what the model says at each of them.
pub struct Chain {
    /// The diffusion at the timesteps kept.
    pub tables: Tables,
    /// What the model predicts.
    pub prediction: Prediction,
    /// Clamp the predicted x_start to −1..1. The official scripts do not: latents are not bounded.
    pub clip_denoised: bool,
    last_timestep: f64,
}

impl Chain {
    /// The chain over the timesteps `kept` (ascending) of a diffusion with these `betas`.
    pub fn new(betas: &[f64], kept: &[usize], prediction: Prediction, clip_denoised: bool) -> Self {
        let last_timestep = betas.len().saturating_sub(1).max(1) as f64;
        Self { tables: Tables::new(betas, kept), prediction, clip_denoised, last_timestep }
    }

    /// The time at `index` for a batch. The noise level of timestep t out of 0..T is t / (T − 1).
    pub(super) fn time(&self, index: usize, samples: i64, device: Device) -> ModelTime {
        let level = self.tables.timestep_map[index] as f64 / self.last_timestep;
        let samples = samples as usize;
        ModelTime { t: self.tables.model_t(&vec![index; samples], device), noise_levels: vec![level; samples] }
    }

    /// x_start as the first half of an output implies it.
    ///
    /// # Shapes
    /// `x_t` [N, C, H, W]; `output` [N, C or 2C, H, W] → [N, C, H, W].
    pub(super) fn x_start(&self, index: usize, x_t: &Tensor, output: &Tensor) -> Tensor {
        let output = output.narrow(1, 0, x_t.size()[1]);
        let x_start = self.prediction.x_start(&self.tables, x_t, &[index], &output);
        if self.clip_denoised { x_start.clamp(-1.0, 1.0) } else { x_start }
    }
}
