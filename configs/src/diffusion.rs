//! `[diffusion]`: what the model learns to predict, and the process that it reverses.

use serde::{Deserialize, Serialize};

use crate::schema::is_default;

/// `diffusion.objective`: what the model predicts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// The noise (with the learnt variance if `model.learn_sigma`, as the next two).
    Eps,
    /// The clean latent.
    XStart,
    /// √ᾱ·noise − √(1 − ᾱ)·x_start.
    V,
    /// The velocity of a straight path from noise to data, in continuous time (flow matching, SiT).
    Flow,
}

/// `diffusion.schedule`: how beta grows with the timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// In equal steps, from 0.1 / timesteps to 20 / timesteps unless `beta_start` and `beta_end` say otherwise.
    Linear,
    /// So that the signal falls as a squared cosine; `squaredcos_cap_v2` in the official code.
    SquaredCosine,
    /// √beta in equal steps, from 0.00085 to 0.012 unless `beta_start` and `beta_end` say otherwise.
    ScaledLinear,
}

/// `diffusion.timestep_sampling`: how flow matching draws its times.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TimestepSampling {
    /// Evenly.
    #[default]
    Uniform,
    /// The middle more often: sigmoid of a normal draw with `logit_mean` and `logit_std`.
    LogitNormal,
}

/// `[diffusion]`. Keys that came later are recorded only where they differ from their defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DiffusionConfig {
    /// What the model predicts.
    pub objective: Objective,
    /// How beta grows; of no meaning with [`Objective::Flow`], as `timesteps`.
    pub schedule: Schedule,
    /// Number of diffusion steps, 21 to 100000 (with 20 or fewer the last beta of the linear schedule would reach 1).
    pub timesteps: usize,
    /// First beta of the linear and the scaled-linear schedule, in (0, 1); given together with `beta_end`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_start: Option<f64>,
    /// Last beta, from `beta_start` to below 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub beta_end: Option<f64>,
    /// Rescale the schedule so that the last timestep is pure noise; with x_start or v only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub zero_terminal_snr: bool,
    /// Min-SNR weighting of the squared error with this γ, above 0; `None`: all timesteps count alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_snr_gamma: Option<f64>,
    /// How flow matching draws its times.
    #[serde(default, skip_serializing_if = "is_default")]
    pub timestep_sampling: TimestepSampling,
    /// Mean of the logit of a logit-normal time, -20 to 20; positive ones lie towards data.
    #[serde(default, skip_serializing_if = "is_default")]
    pub logit_mean: f64,
    /// Standard deviation of the logit of a logit-normal time, above 0.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub logit_std: f64,
}

impl Default for DiffusionConfig {
    /// The diffusion of the official DiT.
    fn default() -> Self {
        DiffusionConfig {
            objective: Objective::Eps,
            schedule: Schedule::Linear,
            timesteps: 1000,
            beta_start: None,
            beta_end: None,
            zero_terminal_snr: false,
            min_snr_gamma: None,
            timestep_sampling: TimestepSampling::Uniform,
            logit_mean: 0.0,
            logit_std: 1.0,
        }
    }
}

fn one() -> f64 {
    1.0
}

fn is_one(value: &f64) -> bool {
    *value == 1.0
}
