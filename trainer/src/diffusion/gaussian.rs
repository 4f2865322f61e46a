use super::vlb::sample_mean;
use super::{LossPart, Noised, Objective, Prediction, SampleLosses, Tables, Time};
use super::{learned_log_variance, variational_bound};
use data_loader::draws::Key;
use rand_distr::{Distribution, Uniform};
use tch::Tensor;

/// A Gaussian diffusion in discrete time: predict eps, x_start or v, and with `learn_sigma` the variance as well.
///
/// L = w·mean (target − prediction)² + L_vlb. L_vlb sees the prediction detached, so that it trains the variance only
/// (Nichol & Dhariwal 2021, section 3.1; DiT trains with this sum, unscaled). w is 1, or the min-SNR weight of t.
pub struct Gaussian {
    /// The diffusion.
    pub tables: Tables,
    /// What the first half (without `learn_sigma`: all) of the output means.
    pub prediction: Prediction,
    /// Whether the output has a second half for the variance.
    pub learn_sigma: bool,
    /// Weight of the squared error at every index of the tables.
    mse_weights: Option<Vec<f64>>,
}

impl Gaussian {
    /// Without weighting by time.
    pub fn new(tables: Tables, prediction: Prediction, learn_sigma: bool) -> Self {
        Self { tables, prediction, learn_sigma, mse_weights: None }
    }

    /// The same with min-SNR weights on the squared error, see [`Prediction::min_snr_weight`].
    pub fn min_snr(self, gamma: f64) -> Self {
        let weight = |&alpha: &f64| self.prediction.min_snr_weight(alpha, gamma);
        let weights = self.tables.alphas_cumprod.iter().map(weight).collect();
        Self { mse_weights: Some(weights), ..self }
    }

    /// mse and (with `learn_sigma`) vb in bits of every sample, `[N]` each, before weighting.
    pub fn per_sample(&self, output: &Tensor, noised: &Noised) -> (Tensor, Option<Tensor>) {
        let Noised { x_start, x_t, noise, t, .. } = noised;
        let (tables, t, channels) = (&self.tables, t.steps(), x_t.size()[1]);
        let predicted = output.narrow(1, 0, channels);
        let target = self.prediction.target(tables, x_start, noise, t);
        let mse = sample_mean(&(target - &predicted).square());
        let bound = self.learn_sigma.then(|| {
            let pred_xstart = self.prediction.x_start(tables, x_t, t, &predicted.detach());
            let log_variance = learned_log_variance(tables, t, &output.narrow(1, channels, channels));
            variational_bound(tables, x_start, x_t, t, &pred_xstart, &log_variance).bound_bits
        });
        (mse, bound)
    }
}

impl Objective for Gaussian {
    fn draw_times(&self, samples: usize, key: Key) -> Time {
        let mut rng = key.rng();
        Time::Steps(match Uniform::new(0, self.tables.timesteps()) {
            Ok(uniform) => (0..samples).map(|_| uniform.sample(&mut rng)).collect(),
            Err(_) => vec![0; samples],
        })
    }

    fn times_at(&self, shares: &[f64]) -> Time {
        let timesteps = self.tables.timesteps();
        let at = |share: &f64| ((share * timesteps as f64) as usize).min(timesteps - 1);
        Time::Steps(shares.iter().map(at).collect())
    }

    fn noised(&self, x_start: Tensor, t: Time, noise: Tensor) -> Noised {
        let x_t = self.tables.q_sample(&x_start, t.steps(), &noise);
        let model_t = self.tables.model_t(t.steps(), x_start.device());
        Noised { x_start, x_t, noise, t, model_t }
    }

    fn losses(&self, output: &Tensor, noised: &Noised) -> SampleLosses {
        let (mse, vb) = self.per_sample(output, noised);
        let of_sample = |weights: &Vec<f64>| Tables::gather(weights, noised.t.steps(), output.device()).view([-1]);
        let mse = LossPart { name: "mse", values: mse, weights: self.mse_weights.as_ref().map(of_sample) };
        SampleLosses::new(mse, vb.map(|vb| LossPart::new("vb", vb)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Respacing, Schedule, zero_terminal_snr};
    use data_loader::draws::Purpose;
    use tch::{Device, Kind};

    const PREDICTIONS: [Prediction; 3] = [Prediction::Eps, Prediction::XStart, Prediction::V];

    fn tables() -> Tables {
        Tables::new(&Schedule::Linear.betas(1000), &Respacing::All.kept(1000).unwrap())
    }

    fn draw(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn noised(objective: &Gaussian, t: &[usize]) -> Noised {
        tch::manual_seed(3);
        let shape = [t.len() as i64, 2, 4, 4];
        objective.noised(draw(&shape), Time::Steps(t.to_vec()), draw(&shape))
    }

    /// An output of which the first half is the target, off by `error`, and the second half 0.25.
    fn output(objective: &Gaussian, noised: &Noised, error: f64) -> Tensor {
        let target = objective.prediction.target(&objective.tables, &noised.x_start, &noised.noise, noised.t.steps());
        Tensor::cat(&[&target + error, target.full_like(0.25)], 1)
    }

    fn numbers(tensor: &Tensor) -> Vec<f64> {
        tensor.to_kind(Kind::Double).try_into().unwrap()
    }

    #[test]
    fn every_prediction_is_judged_by_its_own_target() {
        for prediction in PREDICTIONS {
            let objective = Gaussian::new(tables(), prediction, true);
            let noised = noised(&objective, &[0, 10, 500, 999]);
            let losses = objective.losses(&output(&objective, &noised, 0.5), &noised);
            let mse = losses.parts().find(|part| part.name == "mse").unwrap();
            assert!(numbers(&mse.values).iter().all(|mse| (mse - 0.25).abs() < 1e-5), "{prediction:?}");
        }
    }

    #[test]
    fn the_bound_depends_on_the_implied_x_start_only() {
        // Outputs that imply one and the same wrong x_start have the same bound but for rounding.
        let bounds = PREDICTIONS.map(|prediction| {
            let objective = Gaussian::new(tables(), prediction, true);
            let noised = noised(&objective, &[0, 5, 300]);
            let (t, implied) = (noised.t.steps(), &noised.x_start + 0.01);
            let eps = objective.tables.eps_from_x_start(&noised.x_t, t, &implied);
            let predicted = prediction.target(&objective.tables, &implied, &eps, t);
            let output = Tensor::cat(&[&predicted, &predicted.full_like(0.25)], 1);
            numbers(&objective.per_sample(&output, &noised).1.unwrap())
        });
        for (i, of_eps) in bounds[0].iter().enumerate() {
            let close = |bound: f64| (bound - of_eps).abs() < 1e-5 + 1e-3 * of_eps;
            assert!(*of_eps > 1e-6 && close(bounds[1][i]) && close(bounds[2][i]), "{bounds:?}");
        }
    }

    #[test]
    fn the_bound_trains_the_variance_only() {
        for prediction in PREDICTIONS {
            let objective = Gaussian::new(tables(), prediction, true);
            let noised = noised(&objective, &[5, 400]);
            let output = output(&objective, &noised, 0.1).set_requires_grad(true);
            let grad = |loss: Tensor| Tensor::run_backward(&[loss], &[&output], false, false).remove(0);
            let (_, vb) = objective.per_sample(&output, &noised);
            let of_bound = grad(vb.unwrap().mean(None));
            assert_eq!(of_bound.narrow(1, 0, 2).abs().max().double_value(&[]), 0.0, "{prediction:?}");
            assert!(of_bound.narrow(1, 2, 2).abs().max().double_value(&[]) > 0.0, "{prediction:?}");
            let of_all = grad(objective.loss(&output, &noised).total);
            // d mean(0.1²)/d output = 2·0.1/64 in every element of the first half.
            let off = (of_all.narrow(1, 0, 2) - 0.2 / 64.0).abs().max().double_value(&[]);
            assert!(off < 1e-6, "{prediction:?}: {off}");
        }
    }

    #[test]
    fn min_snr_weights_the_squared_error_and_nothing_else() {
        for prediction in PREDICTIONS {
            let plain = Gaussian::new(tables(), prediction, true);
            let t = [0, 20, 600];
            let noised = noised(&plain, &t);
            let output = output(&plain, &noised, 0.5);
            let (mse, vb) = plain.per_sample(&output, &noised);
            let weighted = Gaussian::new(tables(), prediction, true).min_snr(5.0);
            let terms = weighted.loss(&output, &noised);
            let weights = t.map(|t| prediction.min_snr_weight(plain.tables.alphas_cumprod[t], 5.0));
            let expected: f64 = numbers(&mse)
                .iter()
                .zip(numbers(&vb.unwrap()))
                .zip(weights)
                .map(|((mse, vb), weight)| (mse * weight + vb) / 3.0)
                .sum();
            assert!((terms.total.double_value(&[]) - expected).abs() < 1e-5, "{prediction:?}");
            // Logged before weighting, so that runs with and without it compare.
            assert!((terms.parts[0].1.double_value(&[]) - 0.25).abs() < 1e-5, "{prediction:?}");
            let total = weighted.losses(&output, &noised).total().mean(Kind::Double);
            assert!((total.double_value(&[]) - expected).abs() < 1e-5, "{prediction:?}");
        }
    }

    #[test]
    fn training_from_pure_noise_is_finite() {
        let betas = zero_terminal_snr(&Schedule::Linear.betas(1000));
        for prediction in [Prediction::XStart, Prediction::V] {
            let tables = Tables::new(&betas, &Respacing::All.kept(1000).unwrap());
            let objective = Gaussian::new(tables, prediction, true).min_snr(5.0);
            let noised = noised(&objective, &[999, 998]);
            let output = output(&objective, &noised, 0.5).set_requires_grad(true);
            let loss = objective.loss(&output, &noised).total;
            assert!(loss.double_value(&[]).is_finite(), "{prediction:?}");
            let grad = Tensor::run_backward(&[loss], &[&output], false, false).remove(0);
            assert!(grad.isfinite().all().int64_value(&[]) == 1, "{prediction:?}");
        }
    }

    #[test]
    fn times_are_those_of_the_key_and_cover_the_chain() {
        let objective = Gaussian::new(tables(), Prediction::Eps, true);
        let times = objective.draw_times(4, Key::new(1, Purpose::Timestep, 2).lane(3));
        // A run goes on with a newer build: these numbers may never change.
        assert_eq!(times, Time::Steps(vec![669, 447, 160, 84]));
        assert_eq!(objective.times_at(&[0.0, 0.25, 0.9999]), Time::Steps(vec![0, 250, 999]));
    }
}
