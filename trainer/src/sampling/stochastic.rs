use super::flow::velocity_at;
use super::{Denoise, Sampler, SamplingError, Step};
use std::str::FromStr;
use tch::Tensor;

/// How much noise a stochastic sampler adds along the flow: the diffusion coefficient w(t), up to its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiffusionForm {
    /// 1.
    Constant,
    /// σ_t = 1 − t.
    Sigma,
    /// 1 − t, which for the straight path is the same.
    Linear,
    /// (norm·cos πt + 1)² / 4.
    Decreasing,
    /// sin² πt.
    IncreasingDecreasing,
}

impl DiffusionForm {
    const NAMES: [(&str, DiffusionForm); 5] = [
        ("constant", DiffusionForm::Constant),
        ("sigma", DiffusionForm::Sigma),
        ("linear", DiffusionForm::Linear),
        ("decreasing", DiffusionForm::Decreasing),
        ("increasing-decreasing", DiffusionForm::IncreasingDecreasing),
    ];

    /// w(t).
    pub fn at(self, t: f64, norm: f64) -> f64 {
        let angle = std::f64::consts::PI * t;
        match self {
            DiffusionForm::Constant => norm,
            DiffusionForm::Sigma | DiffusionForm::Linear => norm * (1.0 - t),
            DiffusionForm::Decreasing => 0.25 * (norm * angle.cos() + 1.0).powi(2),
            DiffusionForm::IncreasingDecreasing => norm * angle.sin().powi(2),
        }
    }
}

impl FromStr for DiffusionForm {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, form)| *form);
        let names = Self::NAMES.map(|(name, _)| name).join(", ");
        found.ok_or_else(|| match name.to_lowercase().as_str() {
            "sbdm" => format!("w = (1 − t)/t is infinite where the straight path begins, at t = 0; use one of {names}"),
            _ => format!("use one of {names}"),
        })
    }
}

/// How a stochastic sampler covers the last piece of the path, where the score's factor 1/(1 − t) grows without bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastStep {
    /// None: the steps go up to t = 1.
    None,
    /// One step without noise: the mean of the next state.
    Mean,
    /// The posterior mean of the data (Tweedie's formula).
    Tweedie,
    /// One Euler step along the flow.
    Euler,
}

impl FromStr for LastStep {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(LastStep::None),
            "mean" => Ok(LastStep::Mean),
            "tweedie" => Ok(LastStep::Tweedie),
            "euler" => Ok(LastStep::Euler),
            _ => Err("use one of mean, tweedie, euler, none".to_owned()),
        }
    }
}

/// How one step of the stochastic equation is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StochasticMethod {
    /// Drift and noise at the beginning of the step.
    EulerMaruyama,
    /// Noise first, then the trapezoid rule for the drift. It evaluates the drift at the end of the step, so it cannot
    /// step onto t = 1: it needs a last step.
    Heun,
}

/// The flow's stochastic differential equation dx = (v + w·score) dt + √(2w) dW, which has the same marginals as the
/// flow for every w(t) ≥ 0. On the straight path score = (t·v − x) / (1 − t).
///
/// # Source
/// SiT (Ma et al. 2024), section 2, with the settings of its code, where w is half of the paper's.
pub struct StochasticFlow {
    /// How a step is made.
    pub method: StochasticMethod,
    /// w(t).
    pub diffusion: DiffusionForm,
    /// Its norm.
    pub norm: f64,
    /// Equal steps before the last one.
    pub steps: usize,
    /// The last one.
    pub last_step: LastStep,
    /// Length of the last one; not used without one.
    pub last_step_size: f64,
}

impl StochasticFlow {
    /// Where the equal steps end.
    fn end(&self) -> f64 {
        if self.last_step == LastStep::None { 1.0 } else { 1.0 - self.last_step_size }
    }

    /// v + w·score at `t` < 1.
    fn drift(&self, denoise: Denoise, x: &Tensor, t: f64) -> Tensor {
        let v = velocity_at(denoise, x, t);
        let score = score(&v, x, t);
        v + score * self.diffusion.at(t, self.norm)
    }
}

fn score(v: &Tensor, x: &Tensor, t: f64) -> Tensor {
    (v * t - x) / (1.0 - t)
}

impl Sampler for StochasticFlow {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let end = self.end();
        let dt = end / self.steps as f64;
        let mut x = start;
        for number in 0..self.steps {
            let t = number as f64 * dt;
            let kick = noise(number) * (2.0 * self.diffusion.at(t, self.norm) * dt).sqrt();
            x = match self.method {
                StochasticMethod::EulerMaruyama => &x + self.drift(denoise, &x, t) * dt + kick,
                StochasticMethod::Heun => {
                    let kicked = x + kick;
                    let first = self.drift(denoise, &kicked, t);
                    let second = self.drift(denoise, &(&kicked + &first * dt), t + dt);
                    kicked + (first + second) * (0.5 * dt)
                }
            };
            observe(Step { number, t, x: &x, pred_xstart: None });
        }
        let last = match self.last_step {
            LastStep::None => return Ok(x),
            LastStep::Mean => &x + self.drift(denoise, &x, end) * self.last_step_size,
            LastStep::Euler => &x + velocity_at(denoise, &x, end) * self.last_step_size,
            LastStep::Tweedie => {
                let score = score(&velocity_at(denoise, &x, end), &x, end);
                (&x + score * (1.0 - end).powi(2)) / end
            }
        };
        observe(Step { number: self.steps, t: end, x: &last, pred_xstart: None });
        Ok(last)
    }
}
