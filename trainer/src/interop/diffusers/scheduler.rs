//! `scheduler_config.json`: the noise schedule in terms of diffusers' `DDIMScheduler`.

use super::DiffusersError;
use super::config::DIFFUSERS_VERSION;
use crate::diffusion::{Prediction, Process};
use serde_json::{Value, json};

/// How far a beta may be, relatively, from what diffusers computes in float32 for a schedule by name.
const SAME_BETA: f64 = 1e-6;

/// The scheduler for a process. Deterministic DDIM on the timesteps of the official `ddimN`, so that any number of steps works.
///
/// # Errors
/// A process that no scheduler which `DiTPipeline` can drive reverses.
pub(super) fn config_of(process: &Process) -> Result<Value, DiffusersError> {
    let Process::Gaussian { betas, prediction } = process else {
        return Err(DiffusersError::NotRepresentable {
            what: "a flow-matching model".to_owned(),
            why: "DiTPipeline reverses Gaussian diffusions; it would feed the model timesteps 999 … 0 instead of times in [0, 1]"
                .to_owned(),
        });
    };
    let (first, last) = (betas.first().copied().unwrap_or_default(), betas.last().copied().unwrap_or_default());
    let zero_terminal_snr = last >= 1.0;
    let mut config = json!({
        "_class_name": "DDIMScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "num_train_timesteps": betas.len(),
        "beta_schedule": "linear",
        "beta_start": first,
        "beta_end": last,
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
        "rescale_betas_zero_snr": zero_terminal_snr,
        // The last timestep has to be among those of a zero-terminal-SNR schedule; else those of the official "ddimN".
        "timestep_spacing": if zero_terminal_snr { "trailing" } else { "leading" },
    });
    match name(betas) {
        Some(name) => config["beta_schedule"] = name.into(),
        None => config["trained_betas"] = betas.as_slice().into(),
    }
    Ok(config)
}

/// The name under which diffusers computes these betas from the first and the last, if it has one.
fn name(betas: &[f64]) -> Option<&'static str> {
    let (first, last, end) = (*betas.first()?, *betas.last()?, (betas.len().max(2) - 1) as f64);
    let between = |a: f64, b: f64, i: usize| a + (b - a) * i as f64 / end;
    let alpha_bar = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    let cosine = |i: usize| {
        let steps = betas.len() as f64;
        (1.0 - alpha_bar((i + 1) as f64 / steps) / alpha_bar(i as f64 / steps)).min(0.999)
    };
    let is = |of: &dyn Fn(usize) -> f64| {
        betas.iter().enumerate().all(|(i, beta)| (beta - of(i)).abs() <= SAME_BETA * beta.abs())
    };
    if is(&|i| between(first, last, i)) {
        Some("linear")
    } else if is(&|i| between(first.sqrt(), last.sqrt(), i).powi(2)) {
        Some("scaled_linear")
    } else if is(&cosine) {
        Some("squaredcos_cap_v2")
    } else {
        None
    }
}
