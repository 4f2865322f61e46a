use super::flow::velocity_at;
use super::{Denoise, Sampler, SamplingError, Step};
use tch::Tensor;

/// The coefficients of an explicit Runge–Kutta method.
#[derive(Debug, PartialEq)]
pub struct Tableau {
    /// Where in the step each stage is evaluated, as a share of the step.
    nodes: &'static [f64],
    /// How each stage combines the slopes of the stages before it.
    stages: &'static [&'static [f64]],
    /// How the step combines the slopes of all stages.
    weights: &'static [f64],
}

impl Tableau {
    /// Euler's method, order 1.
    pub const EULER: Tableau = Tableau { nodes: &[0.0], stages: &[&[]], weights: &[1.0] };
    /// The midpoint method, order 2.
    pub const MIDPOINT: Tableau = Tableau { nodes: &[0.0, 0.5], stages: &[&[], &[0.5]], weights: &[0.0, 1.0] };
    /// Heun's method (the explicit trapezoid rule), order 2.
    pub const HEUN2: Tableau = Tableau { nodes: &[0.0, 1.0], stages: &[&[], &[1.0]], weights: &[0.5, 0.5] };
    /// Heun's method of order 3.
    pub const HEUN3: Tableau = Tableau {
        nodes: &[0.0, 1.0 / 3.0, 2.0 / 3.0],
        stages: &[&[], &[1.0 / 3.0], &[0.0, 2.0 / 3.0]],
        weights: &[0.25, 0.0, 0.75],
    };
    /// Kutta's 3/8 rule, order 4.
    pub const RK4: Tableau = Tableau {
        nodes: &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
        stages: &[&[], &[1.0 / 3.0], &[-1.0 / 3.0, 1.0], &[1.0, -1.0, 1.0]],
        weights: &[0.125, 0.375, 0.375, 0.125],
    };
}

/// Follows the flow from noise to data in equal steps.
///
/// # Source
/// Hairer, Nørsett & Wanner 1993, "Solving Ordinary Differential Equations I", section II.1.
pub struct RungeKutta {
    /// The method.
    pub tableau: &'static Tableau,
    /// Steps, which is one fewer than grid points.
    pub steps: usize,
}

impl Sampler for RungeKutta {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        _noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let Tableau { nodes, stages, weights } = *self.tableau;
        let mut x = start;
        for number in 0..self.steps {
            let t = number as f64 / self.steps as f64;
            let dt = (number + 1) as f64 / self.steps as f64 - t;
            let mut slopes: Vec<Tensor> = Vec::with_capacity(nodes.len());
            for (node, stage) in nodes.iter().zip(stages) {
                slopes.push(velocity_at(denoise, &advanced(&x, &slopes, stage, dt), t + node * dt));
            }
            x = advanced(&x, &slopes, weights, dt);
            observe(Step { number, t, x: &x, pred_xstart: None });
        }
        Ok(x)
    }
}

/// x + dt·Σ weight·slope.
fn advanced(x: &Tensor, slopes: &[Tensor], weights: &[f64], dt: f64) -> Tensor {
    let used = slopes.iter().zip(weights).filter(|(_, weight)| **weight != 0.0);
    used.fold(x.shallow_clone(), |sum, (slope, weight)| sum + slope * (weight * dt))
}
