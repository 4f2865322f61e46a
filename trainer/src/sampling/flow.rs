//! What the samplers of a flow share: the model's velocity along x_t = t·x_start + (1 − t)·noise.

use super::{Denoise, ModelTime};
use tch::Tensor;

/// The velocity of every sample, each at its own time.
///
/// # Shapes
/// `x` [N, C, H, W]; N times in 0 (noise) to 1 (data) → [N, C, H, W].
pub(super) fn velocity(denoise: Denoise, x: &Tensor, times: &[f64]) -> Tensor {
    let t: Vec<f32> = times.iter().map(|&t| t as f32).collect();
    let noise_levels = times.iter().map(|t| 1.0 - t).collect();
    let output = denoise(x, &ModelTime { t: Tensor::from_slice(&t).to_device(x.device()), noise_levels });
    output.narrow(1, 0, x.size()[1])
}

/// The velocity with all samples at time `t`.
pub(super) fn velocity_at(denoise: Denoise, x: &Tensor, t: f64) -> Tensor {
    velocity(denoise, x, &vec![t; x.size()[0] as usize])
}
