//! `scheduler_config.json`: the noise schedule in terms of diffusers' `DDIMScheduler`.

use super::DiffusersError;
use super::config::DIFFUSERS_VERSION;
use crate::diffusion::{Prediction, Process, Schedule};
use crate::recipe::Recipe;
use serde_json::{Value, json};

/// The scheduler for a recipe's process: deterministic DDIM on the timesteps of the official `ddimN`.
///
/// # Errors
/// A process that no scheduler which `DiTPipeline` can drive reverses.
pub(super) fn config_of(recipe: &Recipe) -> Result<Value, DiffusersError> {
    let Process::Gaussian { betas, prediction } = recipe.process() else {
        return Err(DiffusersError::NotRepresentable {
            what: "a flow-matching model".to_owned(),
            why: "DiTPipeline would feed it timesteps 999 … 0 instead of times in [0, 1]".to_owned(),
        });
    };
    let d = &recipe.diffusion;
    let (name, schedule) = match d.schedule {
        configs::Schedule::Linear => ("linear", Schedule::Linear),
        configs::Schedule::ScaledLinear => ("scaled_linear", Schedule::ScaledLinear),
        configs::Schedule::SquaredCosine => ("squaredcos_cap_v2", Schedule::SquaredCosine),
    };
    // Before any rescaling, which diffusers does itself. It does not read them for squared cosine.
    let usual = schedule.betas(d.timesteps);
    let usual = (usual.first().copied().unwrap_or_default(), usual.last().copied().unwrap_or_default());
    let (start, end) = d.beta_start.zip(d.beta_end).unwrap_or(usual);
    Ok(json!({
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": betas.len(),
        "beta_schedule": name,
        "beta_start": start,
        "beta_end": end,
        "trained_betas": null,
        "prediction_type": match prediction {
            Prediction::Eps => "epsilon",
            Prediction::XStart => "sample",
            Prediction::V => "v_prediction",
        },
        "clip_sample": false,
        "thresholding": false,
        "set_alpha_to_one": true,
        "steps_offset": 0,
        "rescale_betas_zero_snr": d.zero_terminal_snr,
        // The last timestep has to be among those of a zero-terminal-SNR schedule; else those of the official "ddimN".
        "timestep_spacing": if d.zero_terminal_snr { "trailing" } else { "leading" },
    }))
}
