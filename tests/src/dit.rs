//! What the bundles of DiT models share: dimensions, weights, diffusion.

use crate::bundle::{Bundle, BundleError, Result, Spec};
use tch::{Device, Tensor};
use trainer::diffusion::{Prediction, Respacing, Schedule, Tables};
use trainer::engine::bucket::{Buckets, slice};
use trainer::engine::mesh::Mesh;
use trainer::model::dit::{Conditioning, Dit, DitConfig};
use trainer::model::{Model, WeightSet};
use trainer::sampling::Chain;

/// Timesteps of the schedule that all recorded models were trained on.
const TIMESTEPS: usize = 1000;

/// The model that the `model.…` keys describe.
///
/// # Errors
/// A key that is missing or malformed, or dimensions that do not fit.
pub fn model(bundle: &Bundle) -> Result<Dit> {
    let spec = &bundle.spec;
    let number = |key: &str| spec.parse::<i64>(&format!("model.{key}"), "an integer");
    let config = DitConfig {
        input_size: number("input_size")?,
        in_channels: number("in_channels")?,
        patch_size: number("patch_size")?,
        hidden_size: number("hidden_size")?,
        depth: number("depth")?,
        num_heads: number("num_heads")?,
        mlp_ratio: spec.parse("model.mlp_ratio", "a number")?,
        class_dropout_prob: spec.parse("model.class_dropout_prob", "a number")?,
        num_classes: number("num_classes")?,
        learn_sigma: spec.text("model.learn_sigma").unwrap_or_default().to_lowercase().parse().map_err(|_| {
            let found = spec.text("model.learn_sigma").unwrap_or_else(|| "nothing".to_owned());
            BundleError::Key { key: "model.learn_sigma".into(), found, expected: "true or false".into() }
        })?,
        conditioning: conditioning(spec)?,
        numerics: Default::default(),
    };
    Dit::new(config).map_err(|error| BundleError::Run(error.to_string()))
}

/// The design that `variant` names; adaLN-Zero where there is none.
fn conditioning(spec: &Spec) -> Result<Conditioning> {
    let Some(found) = spec.text("variant") else { return Ok(Conditioning::default()) };
    match found.replace('_', "-").as_str() {
        "adaln-zero" => Ok(Conditioning::AdaLnZero),
        "adaln" => Ok(Conditioning::AdaLn),
        "cross-attention" => Ok(Conditioning::CrossAttention),
        "in-context" => Ok(Conditioning::InContext),
        _ => {
            let expected = "`adaln_zero`, `adaln`, `cross_attention` or `in_context`".to_owned();
            Err(BundleError::Key { key: "variant".to_owned(), found, expected })
        }
    }
}

/// The name in bundles of what a probe sees: of block i, `blocks.i.NAME` is `blocki_NAME`, its output `blocki`.
pub fn recorded_name(probe: &str) -> String {
    match probe.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')) {
        Some((index, "")) => format!("block{index}"),
        Some((index, name)) => format!("block{index}_{name}"),
        None => probe.to_owned(),
    }
}

/// The weights below `weights/`.
///
/// # Errors
/// Lists every tensor that is missing, unknown or of another shape.
pub fn weights(bundle: &Bundle, model: &dyn Model) -> Result<WeightSet> {
    WeightSet::from_named(model, bundle.weights("weights/")).map_err(|error| BundleError::Run(error.to_string()))
}

/// The weights below `weights/` in the buckets of a lone rank with one lane; each of the averages is a copy.
///
/// # Errors
/// As [`weights`].
pub fn buckets(bundle: &Bundle, model: &dyn Model, averages: usize) -> Result<Buckets> {
    weights(bundle, model)?;
    let mesh = Mesh::alone(1).map_err(|error| BundleError::Run(error.to_string()))?;
    let buckets = Buckets::zeroed(model, &mesh, averages, Device::Cpu);
    let buckets = buckets.map_err(|error| BundleError::Run(error.to_string()))?;
    let tensors = bundle.weights("weights/");
    tch::no_grad(|| {
        for bucket in &buckets.0 {
            for entry in &bucket.layout.entries {
                slice(&bucket.params, &entry.range()).copy_(&tensors[&entry.name].reshape([-1]));
            }
            bucket.copy_to_averages();
        }
    });
    Ok(buckets)
}

/// A schedule by the name that the official code, diffusers or our configs give it.
///
/// # Errors
/// When there is no such schedule here.
pub fn schedule(name: &str) -> Result<Schedule> {
    match name {
        "linear" => Ok(Schedule::Linear),
        "squaredcos_cap_v2" | "squared-cosine" => Ok(Schedule::SquaredCosine),
        "scaled_linear" | "scaled-linear" => Ok(Schedule::ScaledLinear),
        other => {
            let expected = "`linear`, `squaredcos_cap_v2` or `scaled_linear`".to_owned();
            Err(BundleError::Key { key: "schedule".to_owned(), found: other.to_owned(), expected })
        }
    }
}

/// The tables of a schedule with a respacing.
///
/// # Errors
/// An unknown schedule or an impossible respacing.
pub fn respaced(schedule_name: &str, respacing: &str) -> Result<Tables> {
    Ok(Tables::new(&schedule(schedule_name)?.betas(TIMESTEPS), &kept(respacing)?))
}

/// The timesteps that a respacing keeps.
fn kept(respacing: &str) -> Result<Vec<usize>> {
    let kept = respacing.parse::<Respacing>().and_then(|respacing| respacing.kept(TIMESTEPS));
    kept.map_err(|error| BundleError::Run(format!("respacing `{respacing}`: {error}")))
}

/// The chain of a schedule with a respacing.
///
/// # Errors
/// As [`respaced`].
pub fn chain(schedule_name: &str, respacing: &str, prediction: Prediction, clip_denoised: bool) -> Result<Chain> {
    let betas = schedule(schedule_name)?.betas(TIMESTEPS);
    Ok(Chain::new(&betas, &kept(respacing)?, prediction, clip_denoised))
}

/// The diffusion of a bundle: its `schedule` (linear when absent) and `respacing` (none when absent).
///
/// # Errors
/// As [`respaced`].
pub fn tables(spec: &Spec) -> Result<Tables> {
    let schedule = spec.text("schedule").or_else(|| spec.text("noise_schedule"));
    respaced(schedule.as_deref().unwrap_or("linear"), &spec.text("respacing").unwrap_or_default())
}

/// Latents `[n, C, H, W]` called `name`; an `n` of -1 takes any number.
///
/// # Errors
/// When the tensor is missing or of another shape.
pub fn latents(bundle: &Bundle, name: &str, model: &dyn Model, n: i64) -> Result<Tensor> {
    let shape: Vec<i64> = std::iter::once(n).chain(model.latent_shape().iter().copied()).collect();
    bundle.floats(name, &shape)
}

/// Labels `[n]` called `name`, the null label included where the model has one.
///
/// # Errors
/// When the tensor is missing, of another shape or out of range.
pub fn labels(bundle: &Bundle, name: &str, model: &Dit, n: i64) -> Result<Tensor> {
    let rows = model.config().num_classes + i64::from(model.null_label().is_some());
    bundle.integers(name, &[n], rows)
}

/// Timesteps `[n]` called `name`, indices below `limit`.
///
/// # Errors
/// As [`labels`].
pub fn timesteps(bundle: &Bundle, name: &str, n: i64, limit: usize) -> Result<Vec<usize>> {
    let tensor = bundle.integers(name, &[n], limit as i64)?;
    Ok(crate::bundle::values(&tensor).into_iter().map(|t| t as usize).collect())
}

/// Timesteps as the model reads them without any respacing.
///
/// # Errors
/// As [`labels`].
pub fn raw_timesteps(bundle: &Bundle, name: &str, n: i64) -> Result<Tensor> {
    Ok(bundle.integers(name, &[n], TIMESTEPS as i64)?.to_kind(tch::Kind::Float))
}
