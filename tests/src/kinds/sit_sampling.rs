//! The sampling part of `sit`: the flow followed as a differential equation, ordinary and stochastic.

use super::sampling::compare_trajectory;
use crate::bundle::{Bundle, BundleError, Result};
use crate::dit;
use crate::report::Report;
use tch::Tensor;
use trainer::model::dit::Dit;
use trainer::model::{Model, WeightSet, no_probe};
use trainer::sampling::{
    Dopri5, GuidedChannels, LastStep, ModelTime, RungeKutta, Sampler, Step, StochasticFlow, StochasticMethod, Tableau,
    forward_with_cfg,
};

/// Length of the last step of a stochastic sampler where the bundle does not say it: the official default.
const LAST_STEP_SIZE: f64 = 0.04;
/// Tolerances for dopri5 (absolute, relative): a recorded one is held to any accurate solver.
const ACCURATE: (f64, f64) = (1e-6, 1e-5);

/// One chain of a bundle.
struct Variant {
    /// Its tensors are below `in/NAME` and `out/NAME`.
    name: String,
    sampler: Box<dyn Sampler>,
    cfg_scale: Option<f64>,
    record: Record,
}

/// What is recorded of a chain.
enum Record {
    /// `x_points`: the state at every grid point, the start included.
    Points,
    /// `samples`: the last state.
    Samples,
    /// `x_steps`: the state after every step, the last one included; a last step that is none repeats it. Noise is in
    /// `in/NAME/noises`.
    Steps { noises: i64, repeats_last: bool },
}

/// Compares every chain that `ode_variants` and `sde_variants` of the specification name.
///
/// # Errors
/// A variant or an input that cannot be understood.
pub(super) fn compare(bundle: &Bundle, model: &Dit, weights: &WeightSet, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let z = dit::latents(bundle, "in/z", model, -1)?;
    let y = dit::labels(bundle, "in/z_y", model, z.size()[0])?;
    let list = |key: &str| bundle.spec.text(key).unwrap_or_default();
    let texts = |list: &str| list.split(';').map(str::trim).filter(|text| !text.is_empty()).map(String::from).collect();
    let (odes, sdes): (Vec<String>, Vec<String>) = (texts(&list("ode_variants")), texts(&list("sde_variants")));
    if odes.is_empty() && sdes.is_empty() {
        report.problem("neither `ode_variants` nor `sde_variants` names a chain".to_owned());
    }
    for text in &odes {
        run_variant(bundle, &ode(text)?, model, weights, (&z, &y), report)?;
    }
    for text in &sdes {
        run_variant(bundle, &sde(bundle, text)?, model, weights, (&z, &y), report)?;
    }
    Ok(())
}

/// method|grid points|guidance scale or none.
fn ode(text: &str) -> Result<Variant> {
    let refuse = || BundleError::Key {
        key: "ode_variants".to_owned(),
        found: text.to_owned(),
        expected: "euler, midpoint, heun2, heun3, rk4 or dopri5|grid points, at least 2|scale or none".to_owned(),
    };
    let fields: Vec<&str> = text.split('|').map(str::trim).collect();
    let &[method, points, scale] = &fields[..] else { return Err(refuse()) };
    let name = format!("ode_{method}_{points}_cfg{scale}");
    let points: i64 = points.parse().ok().filter(|points| *points >= 2).ok_or_else(refuse)?;
    let fixed = |tableau: &'static Tableau| -> (Box<dyn Sampler>, Record) {
        (Box::new(RungeKutta { tableau, steps: points as usize - 1 }), Record::Points)
    };
    let (sampler, record) = match method {
        "euler" => fixed(&Tableau::EULER),
        "midpoint" => fixed(&Tableau::MIDPOINT),
        "heun2" => fixed(&Tableau::HEUN2),
        "heun3" => fixed(&Tableau::HEUN3),
        "rk4" => fixed(&Tableau::RK4),
        "dopri5" => (Box::new(Dopri5 { atol: ACCURATE.0, rtol: ACCURATE.1 }) as Box<dyn Sampler>, Record::Samples),
        _ => return Err(refuse()),
    };
    Ok(Variant { name, sampler, cfg_scale: cfg_scale(scale).ok_or_else(refuse)?, record })
}

/// method|diffusion form|last step|steps, perhaps |guidance scale or none.
fn sde(bundle: &Bundle, text: &str) -> Result<Variant> {
    let refuse = |reason: &str| BundleError::Key {
        key: "sde_variants".to_owned(),
        found: text.to_owned(),
        expected: format!("Euler or Heun|diffusion form|Mean, Tweedie, Euler or None|steps, at least 2 ({reason})"),
    };
    let fields: Vec<&str> = text.split('|').map(str::trim).collect();
    let (method, form, last, steps, scale) = match fields[..] {
        [method, form, last, steps] => (method, form, last, steps, None),
        [method, form, last, steps, scale] => (method, form, last, steps, Some(scale)),
        _ => return Err(refuse("four fields")),
    };
    let name = match scale {
        None => format!("sde_{method}_{form}_{last}_{steps}"),
        Some(scale) => format!("sde_{method}_{form}_{last}_{steps}_cfg{scale}"),
    };
    let number = |key: &str, default: f64| match bundle.spec.text(key) {
        None => Ok(default),
        Some(_) => bundle.spec.parse(key, "a number"),
    };
    let steps: i64 = steps.parse().ok().filter(|steps| *steps >= 2).ok_or_else(|| refuse("steps"))?;
    let last_step: LastStep = last.to_lowercase().parse().map_err(|reason: String| refuse(&reason))?;
    let sampler = StochasticFlow {
        method: match method {
            "Euler" => StochasticMethod::EulerMaruyama,
            "Heun" if last_step == LastStep::None => return Err(refuse("Heun steps onto t = 1 without a last step")),
            "Heun" => StochasticMethod::Heun,
            _ => return Err(refuse("method")),
        },
        // The official code spells one form with a double c.
        diffusion: form.replace("incc", "inc").parse().map_err(|reason: String| refuse(&reason))?,
        norm: number("diffusion_norm", 1.0)?,
        steps: steps as usize - 1,
        last_step,
        last_step_size: number("last_step_size", LAST_STEP_SIZE)?,
    };
    let record = Record::Steps { noises: steps - 1, repeats_last: last_step == LastStep::None };
    let cfg_scale = scale.map_or(Some(None), cfg_scale).ok_or_else(|| refuse("scale"))?;
    Ok(Variant { name, sampler: Box::new(sampler), cfg_scale, record })
}

fn cfg_scale(text: &str) -> Option<Option<f64>> {
    if text == "none" { Some(None) } else { text.parse().ok().map(Some) }
}

fn run_variant(
    bundle: &Bundle,
    variant: &Variant,
    model: &Dit,
    weights: &WeightSet,
    (z, y): (&Tensor, &Tensor),
    report: &mut Report,
) -> Result<()> {
    let Variant { name, sampler, cfg_scale, record } = variant;
    let n = z.size()[0];
    // With guidance: the chains of the conditions first, then those of the null label.
    let (start, labels) = match cfg_scale {
        None => (z.shallow_clone(), y.shallow_clone()),
        Some(_) => {
            let null_label = model.null_label().ok_or_else(|| {
                BundleError::Run(format!("variant `{name}` needs a null label; `model.class_dropout_prob` is 0"))
            })?;
            (Tensor::cat(&[z, z], 0), Tensor::cat(&[y, &y.full_like(null_label)], 0))
        }
    };
    let noises = match record {
        Record::Steps { noises, .. } => {
            let shape: Vec<i64> = [*noises].into_iter().chain(start.size()).collect();
            Some(bundle.floats(&format!("in/{name}/noises"), &shape)?)
        }
        _ => None,
    };
    let denoise = |x: &Tensor, time: &ModelTime| match cfg_scale {
        None => weights.forward(model, x, &time.t, &labels, &mut no_probe),
        Some(scale) => forward_with_cfg(model, weights, x, &time.t, &labels, *scale, GuidedChannels::FirstThree),
    };
    let none = start.zeros_like();
    let mut noise = |step: usize| noises.as_ref().map_or_else(|| none.shallow_clone(), |all| all.get(step as i64));
    let mut states = Vec::new();
    let mut observe = |step: Step| states.push(step.x.copy());
    let last = sampler.sample(start.shallow_clone(), &denoise, &mut noise, &mut observe);
    let last = last.map_err(|error| BundleError::Run(format!("variant `{name}`: {error}")))?;
    match record {
        Record::Points => {
            states.insert(0, start);
            compare_trajectory(&format!("out/{name}/x_points"), &Tensor::stack(&states, 0), n, report);
        }
        Record::Samples => report.compare(&format!("out/{name}/samples"), &last.narrow(0, 0, n)),
        Record::Steps { repeats_last, .. } => {
            if *repeats_last {
                states.push(last);
            }
            compare_trajectory(&format!("out/{name}/x_steps"), &Tensor::stack(&states, 0), n, report);
        }
    }
    Ok(())
}
