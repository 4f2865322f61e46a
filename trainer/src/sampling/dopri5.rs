use super::flow::velocity;
use super::{Denoise, Sampler, SamplingError, Step};
use tch::{Kind, Tensor};

/// Follows the flow with the method of Dormand and Prince, order 5 with an embedded order 4, whose difference controls
/// the step size. Every sample has its own times and steps, so that it does not depend on the others of its batch.
///
/// # Source
/// Dormand & Prince 1980; step-size control and first step after Hairer, Nørsett & Wanner 1993, section II.4.
pub struct Dopri5 {
    /// Error per step that is allowed whatever the size of the state.
    pub atol: f64,
    /// Error per step that is allowed relative to the state.
    pub rtol: f64,
}

const NODES: [f64; 6] = [1.0 / 5.0, 3.0 / 10.0, 4.0 / 5.0, 8.0 / 9.0, 1.0, 1.0];
/// The last row is also the solution of order 5: the slope there is the first one of the next step.
const STAGES: [&[f64]; 6] = [
    &[1.0 / 5.0],
    &[3.0 / 40.0, 9.0 / 40.0],
    &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
    &[19372.0 / 6561.0, -25360.0 / 2187.0, 64448.0 / 6561.0, -212.0 / 729.0],
    &[9017.0 / 3168.0, -355.0 / 33.0, 46732.0 / 5247.0, 49.0 / 176.0, -5103.0 / 18656.0],
    &[35.0 / 384.0, 0.0, 500.0 / 1113.0, 125.0 / 192.0, -2187.0 / 6784.0, 11.0 / 84.0],
];
/// Order 5 minus order 4.
const ERROR: [f64; 7] =
    [71.0 / 57600.0, 0.0, -71.0 / 16695.0, 71.0 / 1920.0, -17253.0 / 339200.0, 22.0 / 525.0, -1.0 / 40.0];
/// Steps tried before the solver gives up.
const MOST_TRIALS: usize = 10_000;
/// float32 cannot tell times apart that are much closer.
const SHORTEST_STEP: f64 = 1e-7;

impl Dopri5 {
    /// Root mean square of `values` over the tolerance at states of the size of `a` and `b`, for every sample.
    fn norm(&self, values: &Tensor, a: &Tensor, b: &Tensor) -> Vec<f64> {
        let allowed = a.abs().maximum(&b.abs()) * self.rtol + self.atol;
        let mean = (values / allowed).square().flatten(1, -1).mean_dim(&[1i64][..], false, Kind::Float).sqrt();
        Vec::<f32>::try_from(mean.to_device(tch::Device::Cpu))
            .map(|norms| norms.into_iter().map(f64::from).collect())
            // One dimension of float32, as computed above.
            .unwrap_or_default()
    }

    /// A first step that an Euler step suggests to be short enough.
    fn first_steps(&self, denoise: Denoise, x: &Tensor, slope: &Tensor) -> Vec<f64> {
        let (sizes, slopes) = (self.norm(x, x, x), self.norm(slope, x, x));
        let guesses: Vec<f64> = sizes
            .iter()
            .zip(&slopes)
            .map(|(size, slope)| if size.min(*slope) < 1e-5 { 1e-6 } else { 0.01 * size / slope })
            .map(|guess| guess.min(1.0))
            .collect();
        let ahead = velocity(denoise, &(x + slope * column(&guesses, x)), &guesses);
        let bends = self.norm(&(ahead - slope), x, x);
        let step = |index: usize| {
            let steepest = slopes[index].max(bends[index] / guesses[index]);
            let step = if steepest <= 1e-15 { 1e-6f64.max(1e-3 * guesses[index]) } else { (0.01 / steepest).powf(0.2) };
            step.min(100.0 * guesses[index]).min(1.0)
        };
        (0..guesses.len()).map(step).collect()
    }
}

/// One value a sample, to multiply a batch like `x`.
fn column(values: &[f64], x: &Tensor) -> Tensor {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::from_slice(&values).view([-1, 1, 1, 1]).to_device(x.device())
}

fn combined(slopes: &[Tensor], weights: &[f64]) -> Tensor {
    let mut used = slopes.iter().zip(weights).filter(|(_, weight)| **weight != 0.0);
    let first = used.next().map_or_else(|| slopes[0].zeros_like(), |(slope, weight)| slope * *weight);
    used.fold(first, |sum, (slope, weight)| sum + slope * *weight)
}

impl Sampler for Dopri5 {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        _noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let mut x = start;
        let mut times = vec![0.0f64; x.size()[0] as usize];
        let mut slope = velocity(denoise, &x, &times);
        let mut steps = self.first_steps(denoise, &x, &slope);
        for number in 0..MOST_TRIALS {
            let Some(earliest) = times.iter().copied().filter(|&t| t < 1.0).min_by(f64::total_cmp) else {
                return Ok(x);
            };
            // Samples that have arrived wait with steps of length 0.
            let lengths: Vec<f64> = times.iter().zip(&steps).map(|(t, step)| step.min(1.0 - t)).collect();
            let dt = column(&lengths, &x);
            let mut slopes = vec![slope.shallow_clone()];
            let mut next = x.shallow_clone();
            for (node, stage) in NODES.iter().zip(STAGES) {
                next = &x + combined(&slopes, stage) * &dt;
                let at: Vec<f64> = times.iter().zip(&lengths).map(|(t, length)| t + node * length).collect();
                slopes.push(velocity(denoise, &next, &at));
            }
            let errors = self.norm(&(combined(&slopes, &ERROR) * &dt), &x, &next);
            let mut accepted = vec![0.0; times.len()];
            for (index, error) in errors.into_iter().enumerate() {
                if times[index] >= 1.0 {
                    continue;
                }
                let stuck = error > 1.0 && lengths[index] < SHORTEST_STEP;
                if !error.is_finite() || stuck {
                    return Err(SamplingError::Stuck { sample: index, t: times[index], error });
                }
                if error <= 1.0 {
                    accepted[index] = 1.0;
                    let arrives = lengths[index] >= 1.0 - times[index];
                    times[index] = if arrives { 1.0 } else { times[index] + lengths[index] };
                }
                let growth = if error == 0.0 { 10.0 } else { (0.9 * error.powf(-0.2)).clamp(0.2, 10.0) };
                steps[index] = lengths[index] * growth;
            }
            let accepted = column(&accepted, &x).gt(0.5);
            x = next.where_self(&accepted, &x);
            slope = slopes.swap_remove(6).where_self(&accepted, &slope);
            observe(Step { number, t: earliest, x: &x, pred_xstart: None });
        }
        let late = times.iter().position(|&t| t < 1.0).unwrap_or(0);
        Err(SamplingError::Stuck { sample: late, t: times[late], error: f64::NAN })
    }
}
