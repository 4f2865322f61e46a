//! Samplers on problems with known solutions: data that are Gaussian, for which the ideal prediction is linear.

#![allow(clippy::unwrap_used)]

use super::*;
use crate::diffusion::{Prediction, Process};
use tch::Kind;

/// The data: N(MEAN, STD²) in every element.
const MEAN: f64 = 0.7;
const STD: f64 = 0.4;
/// The official linear schedule with one more timestep, so that steps can be halved exactly.
const TIMESTEPS: usize = 1001;

fn betas() -> Vec<f64> {
    (0..TIMESTEPS).map(|t| 1e-4 + (0.02 - 1e-4) * t as f64 / (TIMESTEPS - 1) as f64).collect()
}

/// [N, 1, 1, 1] float64: in float32 rounding would hide the higher orders.
fn batch(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).view([-1, 1, 1, 1])
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).view([-1])).unwrap()
}

fn no_noise(_: usize) -> Tensor {
    panic!("a deterministic sampler asks for noise")
}

fn run(sampler: &dyn Sampler, start: &Tensor, denoise: Denoise) -> Tensor {
    sampler.sample(start.copy(), denoise, &mut no_noise, &mut |_| {}).unwrap()
}

/// The velocity of the flow from N(0, 1) to the data, each row at its own time.
fn velocity(x: &Tensor, time: &ModelTime) -> Tensor {
    let t = batch(&time.noise_levels.iter().map(|level| 1.0 - level).collect::<Vec<_>>());
    let rest: Tensor = 1.0 - &t;
    let variance = (&t * STD).square() + rest.square();
    (&t * (STD * STD) - rest) / variance * (x - &t * MEAN) + MEAN
}

/// Where the flow carries `z`: every element keeps its distance from the mean, in standard deviations.
fn data_of(z: f64) -> f64 {
    MEAN + STD * z
}

/// Largest error for some starts of following `velocity` to the end, where `z` should be carried to `end(z)`.
fn flow_error(options: SamplerOptions, velocity: Denoise, end: impl Fn(f64) -> f64) -> f64 {
    let starts = [-2.0, -0.3, 0.5, 0.8];
    let found = values(&run(&*options.build(&Process::Flow).unwrap(), &batch(&starts), velocity));
    found.iter().zip(starts).map(|(x, z)| (x - end(z)).abs()).fold(0.0, f64::max)
}

#[test]
fn fixed_steps_converge_with_the_order_of_their_method() {
    // For the Gaussian the leading error of the midpoint method happens to vanish, so the order is measured on
    // x' = t·x², x(1) = 1 / (1/z − 1/2).
    let squares = |x: &Tensor, time: &ModelTime| x.square() * (1.0 - time.noise_levels[0]);
    for (kind, order, steps) in [
        (SamplerKind::Euler, 1, 200),
        (SamplerKind::Midpoint, 2, 100),
        (SamplerKind::Heun, 2, 100),
        (SamplerKind::Heun3, 3, 60),
        (SamplerKind::Rk4, 4, 30),
    ] {
        let error = |steps| flow_error(SamplerOptions::new(kind, steps), &squares, |z| 1.0 / (1.0 / z - 0.5));
        let measured = (error(steps) / error(2 * steps)).log2();
        assert!((measured - f64::from(order)).abs() < 0.25, "{kind}: order {measured}");
        let of_gaussian = flow_error(SamplerOptions::new(kind, steps), &velocity, data_of);
        assert!(of_gaussian < 1e-2 / steps.pow(order - 1) as f64, "{kind}: {of_gaussian:e}");
    }
}

#[test]
fn dopri5_keeps_to_its_tolerance_and_leaves_the_batch_out_of_it() {
    let error = |rtol| {
        let options = SamplerOptions { atol: rtol / 10.0, rtol, ..SamplerOptions::new(SamplerKind::Dopri5, 0) };
        flow_error(options, &velocity, data_of)
    };
    let (loose, tight) = (error(1e-3), error(1e-6));
    assert!(loose < 1e-2 && tight < 1e-5 && tight < loose / 50.0, "{loose:e} {tight:e}");
    let solver = Dopri5 { atol: 1e-6, rtol: 1e-3 };
    let together = values(&run(&solver, &batch(&[0.4, -3.0, 8.0]), &velocity));
    for (z, x) in [0.4, -3.0, 8.0].into_iter().zip(together) {
        assert_eq!(values(&run(&solver, &batch(&[z]), &velocity)), [x]);
    }
}

#[test]
fn dopri5_says_where_it_is_stuck() {
    let wall = |x: &Tensor, time: &ModelTime| x.zeros_like() + if time.noise_levels[1] < 0.5 { f64::NAN } else { 1.0 };
    let solver = Dopri5 { atol: 1e-6, rtol: 1e-3 };
    let error = solver.sample(batch(&[0.0, 1.0]), &wall, &mut no_noise, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("gets no further than t = 0"), "{error}");
}

/// Mean and variance of the samples of a stochastic sampler, exactly: a linear sampler of a linear drift maps start
/// and noise linearly, and a batch of unit impulses shows how.
fn moments(options: SamplerOptions) -> (f64, f64) {
    let rows = options.steps as i64 + 2;
    let unit = |row: i64| batch(&(0..rows).map(|of| f64::from(of == row)).collect::<Vec<_>>());
    let mut impulse = |step: usize| unit(step as i64 + 2);
    let sampler = options.build(&Process::Flow).unwrap();
    let ends = values(&sampler.sample(unit(1), &velocity, &mut impulse, &mut |_| {}).unwrap());
    (ends[0], ends[1..].iter().map(|end| (end - ends[0]).powi(2)).sum())
}

#[test]
fn stochastic_samplers_converge_to_the_distribution_of_the_data() {
    let forms = ["sigma", "linear", "constant", "decreasing", "increasing-decreasing"];
    for form in forms.map(|name| name.parse::<DiffusionForm>().unwrap()) {
        for (kind, last_step) in [
            (SamplerKind::EulerMaruyama, LastStep::Mean),
            (SamplerKind::EulerMaruyama, LastStep::Tweedie),
            (SamplerKind::EulerMaruyama, LastStep::Euler),
            (SamplerKind::StochasticHeun, LastStep::Mean),
        ] {
            // The last step shrinks with the others, so that its own error vanishes too.
            let error = |steps: usize| {
                let options = SamplerOptions {
                    sde_diffusion: form,
                    sde_last_step: last_step,
                    sde_last_step_size: 2.0 / steps as f64,
                    ..SamplerOptions::new(kind, steps)
                };
                let (mean, variance) = moments(options);
                (mean - MEAN).abs() + (variance.sqrt() - STD).abs()
            };
            let (coarse, fine) = (error(100), error(400));
            assert!(
                fine < 0.02 && fine < (coarse / 2.5).max(1e-3),
                "{kind} {form:?} {last_step:?}: {coarse:e} {fine:e}"
            );
        }
    }
}

#[test]
fn euler_maruyama_without_a_last_step_is_of_weak_order_one() {
    let error = |steps| {
        let options =
            SamplerOptions { sde_last_step: LastStep::None, ..SamplerOptions::new(SamplerKind::EulerMaruyama, steps) };
        let (mean, variance) = moments(options);
        (mean - MEAN).abs() + (variance - STD * STD).abs()
    };
    let order = (error(200) / error(400)).log2();
    assert!((order - 1.0).abs() < 0.2, "{order}");
}

#[test]
fn stochastic_settings_that_would_give_nan_are_refused() {
    assert!("SBDM".parse::<DiffusionForm>().unwrap_err().contains("infinite"));
    let options = |kind, last, steps| SamplerOptions { sde_last_step: last, ..SamplerOptions::new(kind, steps) };
    let build = |options: SamplerOptions| options.build(&Process::Flow).err();
    let heun = options(SamplerKind::StochasticHeun, LastStep::None, 10);
    assert!(matches!(build(heun), Some(SamplingError::NoLastStep)));
    let short = options(SamplerKind::EulerMaruyama, LastStep::Mean, 1);
    assert!(matches!(build(short), Some(SamplingError::TooFewSteps { least: 2, .. })));
}

/// √ᾱ and √(1 − ᾱ) of every timestep.
fn schedule(betas: &[f64]) -> Vec<(f64, f64)> {
    let mut ab = 1.0;
    let step = |beta: &f64| {
        ab *= 1.0 - beta;
        (f64::sqrt(ab), f64::sqrt(1.0 - ab))
    };
    betas.iter().map(step).collect()
}

/// What an ideal model of the Gaussian data says in the diffusion with these `betas`.
fn ideal(prediction: Prediction, betas: &[f64]) -> impl Fn(&Tensor, &ModelTime) -> Tensor {
    let schedule = schedule(betas);
    move |x, time| {
        let (alpha, sigma) = schedule[time.t.double_value(&[0]) as usize];
        let variance = (alpha * STD).powi(2) + sigma * sigma;
        let centred = x - alpha * MEAN;
        let x_start = &centred * (alpha * STD * STD / variance) + MEAN;
        let eps = centred * (sigma / variance);
        match prediction {
            Prediction::Eps => eps,
            Prediction::XStart => x_start,
            Prediction::V => eps * alpha - x_start * sigma,
        }
    }
}

#[test]
fn dpm_solver_converges_with_order_two() {
    let betas = betas();
    let schedule = schedule(&betas);
    let from_mean =
        |x: f64, (alpha, sigma): (f64, f64)| (x - alpha * MEAN) / ((alpha * STD).powi(2) + sigma * sigma).sqrt();
    // Half way down: the last step, to σ = 0, is of first order.
    let error = |steps: usize| {
        let sampler = DpmSolver::new(&betas, steps, Prediction::XStart, false).unwrap();
        let start = 1.3;
        let mut middle = f64::NAN;
        let mut observe = |step: Step| {
            if step.number + 1 == steps / 2 {
                middle = values(step.x)[0];
            }
        };
        let _ =
            sampler.sample(batch(&[start]), &ideal(Prediction::XStart, &betas), &mut no_noise, &mut observe).unwrap();
        (from_mean(middle, schedule[500]) - from_mean(start, schedule[1000])).abs()
    };
    let order = (error(40) / error(80)).log2();
    assert!((order - 2.0).abs() < 0.3, "{order}");
}

#[test]
fn dpm_solver_gives_the_numbers_of_its_formula() {
    // Computed in float64 with numpy for betas = linspace(1e-4, 0.02, 1000), t = round(linspace(0, 999, N + 1)), σ = √(1/ᾱ − 1),
    // λ = −ln σ, m = (x − σ̂·eps)/α, h = λ' − λ: x' = σ'/σ·x − α'·(e^−h − 1)·(m + (m − m_before)·h / (2·h_before)), of first order at
    // both ends, with eps as below; for starts −1.5, 0.2, 0.9.
    let betas: Vec<f64> = (0..1000).map(|t| 1e-4 + (0.02 - 1e-4) * f64::from(t) / 999.0).collect();
    let schedule = schedule(&betas);
    let eps = |x: &Tensor, time: &ModelTime| {
        let (alpha, sigma) = schedule[time.t.double_value(&[0]) as usize];
        x * (sigma / (0.25 * alpha * alpha + sigma * sigma)) + (x * 2.0).sin() * (0.1 * alpha)
    };
    let sampler = |steps| DpmSolver::new(&betas, steps, Prediction::Eps, false).unwrap();
    let (mut states, mut times) = (Vec::new(), Vec::new());
    let mut observe = |step: Step| {
        times.push(step.t);
        states.push(values(step.x));
    };
    let start = batch(&[-1.5, 0.2, 0.9]);
    let _ = sampler(5).sample(start.copy(), &eps, &mut no_noise, &mut observe).unwrap();
    states.push(values(&run(&sampler(20), &start, &eps)));
    assert_eq!(times, [999.0, 799.0, 599.0, 400.0, 200.0]);
    for (found, expected) in states.iter().zip(REFERENCE) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 2e-5 * expected.abs().max(1.0), "{found} {expected}");
        }
    }
}

const REFERENCE: [[f64; 3]; 6] = [
    [-1.498496, 0.198584, 0.896182],
    [-1.480723, 0.191754, 0.874695],
    [-1.36474, 0.166802, 0.78098],
    [-0.987715, 0.109938, 0.533138],
    [-0.340113, 0.031069, 0.161351],
    [-0.640145, 0.070512, 0.341627],
];

#[test]
fn every_prediction_gives_the_same_samples() {
    let betas = betas();
    for kind in SamplerKind::that_fit(false) {
        let draw = |prediction| {
            let process = Process::Gaussian { betas: betas.clone(), prediction };
            let sampler = SamplerOptions::new(kind, 20).build(&process).unwrap();
            let mut noise = |step: usize| batch(&[0.5 - step as f64 % 2.0, 0.3]);
            let start = batch(&[-1.0, 2.0]);
            values(&sampler.sample(start, &ideal(prediction, &betas), &mut noise, &mut |_| {}).unwrap())
        };
        let reference = draw(Prediction::XStart);
        for prediction in [Prediction::Eps, Prediction::V] {
            for (found, expected) in draw(prediction).iter().zip(&reference) {
                assert!((found - expected).abs() < 1e-3, "{kind} {prediction:?}: {found} {expected}");
            }
        }
    }
}

#[test]
fn zero_terminal_snr_is_sampled_from_v_and_refused_for_eps() {
    // The schedule shifted and scaled so that ᾱ ends at 0 (Lin et al. 2024, algorithm 1).
    let roots: Vec<f64> = schedule(&betas()).iter().map(|(alpha, _)| *alpha).collect();
    let (first, last) = (roots[0], roots[TIMESTEPS - 1]);
    let scaled: Vec<f64> = roots.iter().map(|root| ((root - last) * first / (first - last)).powi(2)).collect();
    let before = std::iter::once(1.0).chain(scaled.iter().copied());
    let betas: Vec<f64> = scaled.iter().zip(before).map(|(after, before)| 1.0 - after / before).collect();
    assert_eq!(betas[TIMESTEPS - 1], 1.0);
    for kind in SamplerKind::that_fit(false) {
        let options = SamplerOptions::new(kind, 100);
        let process = |prediction| Process::Gaussian { betas: betas.clone(), prediction };
        assert!(matches!(options.build(&process(Prediction::Eps)), Err(SamplingError::ZeroSnr)));
        let sampler = options.build(&process(Prediction::V)).unwrap();
        let mut none = |_: usize| batch(&[0.0, 0.0]);
        let ideal = ideal(Prediction::V, &betas);
        let found = values(&sampler.sample(batch(&[-1.0, 1.5]), &ideal, &mut none, &mut |_| {}).unwrap());
        // Without its noise ddpm ends near the mean.
        let spread = if kind == SamplerKind::Ddpm { 0.0 } else { 1.0 };
        for (x, z) in found.iter().zip([-1.0, 1.5]) {
            assert!((x - data_of(z * spread)).abs() < 0.05, "{kind}: {x} {z}");
        }
    }
}

#[test]
fn clipping_bounds_the_prediction() {
    let betas = betas();
    for kind in SamplerKind::that_fit(false) {
        let options = SamplerOptions { clip_denoised: true, ..SamplerOptions::new(kind, 10) };
        let process = Process::Gaussian { betas: betas.clone(), prediction: Prediction::XStart };
        let far = |x: &Tensor, _: &ModelTime| x.zeros_like() + 3.0;
        let mut none = |_: usize| batch(&[0.0]);
        let found = options.build(&process).unwrap().sample(batch(&[0.2]), &far, &mut none, &mut |_| {}).unwrap();
        assert!((values(&found)[0] - 1.0).abs() < 1e-3, "{kind}: {found:?}");
    }
}

#[test]
fn a_sampler_of_another_process_is_refused_with_those_that_fit() {
    let gaussian = Process::Gaussian { betas: betas(), prediction: Prediction::Eps };
    for (kind, process, fits) in [
        (
            SamplerKind::Ddim,
            &Process::Flow,
            "euler, midpoint, heun, heun3, rk4, dopri5, euler-maruyama, stochastic-heun",
        ),
        (SamplerKind::Euler, &gaussian, "ddpm, ddim, dpm-solver++"),
    ] {
        let error = SamplerOptions::new(kind, 10).build(process).err().unwrap().to_string();
        assert!(error.contains(kind.name()) && error.ends_with(fits), "{error}");
    }
    let too_many = SamplerOptions::new(SamplerKind::DpmSolver, TIMESTEPS).build(&gaussian).err().unwrap();
    assert!(too_many.to_string().contains("use 1 to 1000"), "{too_many}");
}
