//! `sampling`: whole reverse chains with recorded noise, step by step.

use super::{Kind, alone};
use crate::bundle::{Bundle, BundleError, Result};
use crate::dit;
use crate::report::Report;
use crate::tolerance::{Bound, Tolerance};
use tch::Tensor;
use trainer::diffusion::Prediction;
use trainer::model::dit::Dit;
use trainer::model::{Model, WeightSet, no_probe};
use trainer::sampling::{Ddim, Ddpm, GuidedChannels, ModelTime, Sampler, Step, forward_with_cfg};

pub(super) const KIND: Kind = Kind {
    name: "sampling",
    tolerances: &[("out/x_steps,samples", "1e-4*max(1,max|ref|)"), ("out/pred_xstart_steps", "3e-4*max(1,max|ref|)")],
    partner: alone,
    references_in_partner: false,
    run,
};

/// A sampler with its settings: name|p or ddim|respacing|guidance scale or none|clip or noclip|eta.
struct Variant {
    name: String,
    sampler: Box<dyn Sampler>,
    steps: usize,
    cfg_scale: Option<f64>,
    draws_noise: bool,
}

impl Variant {
    fn parse(text: &str, schedule: &str) -> Result<Self> {
        let refuse = || BundleError::Key {
            key: "variants".to_owned(),
            found: text.to_owned(),
            expected: "name|p or ddim|respacing|scale or none|clip or noclip|eta".to_owned(),
        };
        let fields: Vec<&str> = text.split('|').map(str::trim).collect();
        let &[name, sampler, respacing, scale, clip, eta] = &fields[..] else { return Err(refuse()) };
        let clip_denoised = match clip {
            "clip" => true,
            "noclip" => false,
            _ => return Err(refuse()),
        };
        let eta: f64 = eta.parse().map_err(|_| refuse())?;
        let chain = dit::chain(schedule, respacing, Prediction::Eps, clip_denoised)?;
        let steps = chain.tables.timesteps();
        let (sampler, draws_noise): (Box<dyn Sampler>, bool) = match sampler {
            "p" => (Box::new(Ddpm { chain }), true),
            "ddim" => (Box::new(Ddim { chain, eta }), eta != 0.0),
            _ => return Err(refuse()),
        };
        let cfg_scale = match scale {
            "none" => None,
            scale => Some(scale.parse().map_err(|_| refuse())?),
        };
        Ok(Self { name: name.to_owned(), sampler, steps, cfg_scale, draws_noise })
    }
}

fn run(bundle: &Bundle, _: Option<&Bundle>, report: &mut Report) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let model = dit::model(bundle)?;
    let weights = dit::weights(bundle, &model)?;
    let z = dit::latents(bundle, "in/z", &model, -1)?;
    let y = dit::labels(bundle, "in/y", &model, z.size()[0])?;
    let variants = bundle.spec.parse::<String>("variants", "a list of variants")?;
    let schedule = bundle.spec.text("schedule").unwrap_or_else(|| "linear".to_owned());
    for variant in variants.split(';').filter(|text| !text.trim().is_empty()) {
        run_variant(bundle, &Variant::parse(variant, &schedule)?, &model, &weights, &z, &y, report)?;
    }
    Ok(())
}

fn run_variant(
    bundle: &Bundle,
    variant: &Variant,
    model: &Dit,
    weights: &WeightSet,
    z: &Tensor,
    y: &Tensor,
    report: &mut Report,
) -> Result<()> {
    let Variant { name, steps, .. } = variant;
    let n = z.size()[0];
    // With guidance: the chains of the conditions first, then those of the null label.
    let (start, labels) = match variant.cfg_scale {
        None => (z.shallow_clone(), y.shallow_clone()),
        Some(_) => {
            let null_label = model.null_label().ok_or_else(|| {
                BundleError::Run(format!("variant `{name}` needs a null label; `model.class_dropout_prob` is 0"))
            })?;
            (Tensor::cat(&[z, z], 0), Tensor::cat(&[y, &y.full_like(null_label)], 0))
        }
    };
    let rows = start.size()[0];
    let noises = match variant.draws_noise {
        true => {
            let shape: Vec<i64> =
                [*steps as i64, rows].into_iter().chain(model.latent_shape().iter().copied()).collect();
            Some(bundle.floats(&format!("in/{name}/noises"), &shape)?)
        }
        false => None,
    };
    let denoise = |x: &Tensor, time: &ModelTime| match variant.cfg_scale {
        None => weights.forward(model, x, &time.t, &labels, &mut no_probe),
        Some(scale) => forward_with_cfg(model, weights, x, &time.t, &labels, scale, GuidedChannels::FirstThree),
    };
    let none = start.zeros_like();
    let mut noise = |step: usize| noises.as_ref().map_or_else(|| none.shallow_clone(), |all| all.get(step as i64));
    let (mut x_steps, mut predictions, mut model_t) = (Vec::new(), Vec::new(), Vec::new());
    let mut observe = |step: Step| {
        x_steps.push(step.x.copy());
        predictions.extend(step.pred_xstart.map(Tensor::copy));
        model_t.push(step.t as i64);
    };
    let last = variant.sampler.sample(start, &denoise, &mut noise, &mut observe);
    let last = last.map_err(|error| BundleError::Run(format!("variant `{name}`: {error}")))?;

    report.compare(&format!("out/{name}/model_t"), &Tensor::from_slice(&model_t));
    for (output, found) in [("x_steps", &x_steps), ("pred_xstart_steps", &predictions)] {
        compare_trajectory(&format!("out/{name}/{output}"), &Tensor::stack(found, 0), n, report);
    }
    report.compare(&format!("out/{name}/samples"), &last.narrow(0, 0, n));
    Ok(())
}

/// Compares `[steps, n or 2n, C, H, W]`. With guidance the second half never enters the model and drifts away: it is
/// held to the same bound, but relative to its own size.
pub(super) fn compare_trajectory(name: &str, found: &Tensor, n: i64, report: &mut Report) {
    let Some((expected, tolerance)) = report.reference(name, &found.size()) else { return };
    let half = |tensor: &Tensor, first: i64| tensor.narrow(1, first, n);
    report.within(name, name, &half(found, 0), &half(&expected, 0), tolerance);
    if found.size()[1] > n {
        let Bound { of_max, of_floored_max, constant, .. } = tolerance.max;
        let max = Bound { of_max: of_max + of_floored_max, constant, ..Bound::default() };
        let label = format!("{name} (null half)");
        report.within(&label, &label, &half(found, n), &half(&expected, n), Tolerance { max, p999: None });
    }
}
