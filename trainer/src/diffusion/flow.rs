use super::vlb::sample_mean;
use super::{LossPart, Noised, Objective, SampleLosses, Time};
use data_loader::draws::Key;
use rand_distr::{Distribution, StandardNormal, StandardUniform};
use tch::Tensor;

/// Flow matching along straight paths: x_t = t·x_start + (1 − t)·noise, t = 0 noise and t = 1 data; the model predicts
/// the velocity x_start − noise, and L = mean (velocity − prediction)².
///
/// The model reads t as it is, in [0, 1]. Only the first C channels of an output are judged: the second half of a model
/// with `learn_sigma` gets no gradient, as in SiT.
///
/// # Source
/// Lipman et al. 2023; SiT (Ma et al. 2024), linear path with velocity prediction.
pub struct FlowMatching {
    /// How t is drawn.
    pub sampling: TimestepSampling,
}

/// The distribution of t in training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum TimestepSampling {
    /// Uniform in [0, 1).
    Uniform,
    /// t = sigmoid(mean + std·n) with a standard normal n (Esser et al. 2024, section 3.1): more of the middle of the
    /// path. A positive mean moves t towards data (Esser et al. let t grow towards noise: their m is −mean).
    LogitNormal {
        /// Of the logit of t.
        mean: f64,
        /// Of the logit of t; above 0.
        std: f64,
    },
}

impl Objective for FlowMatching {
    fn draw_times(&self, samples: usize, key: Key) -> Time {
        let mut rng = key.rng();
        let mut draw = || match self.sampling {
            TimestepSampling::Uniform => StandardUniform.sample(&mut rng),
            TimestepSampling::LogitNormal { mean, std } => {
                let n: f64 = StandardNormal.sample(&mut rng);
                (1.0 / (1.0 + (-(mean + std * n)).exp())) as f32
            }
        };
        Time::Continuous((0..samples).map(|_| draw()).collect())
    }

    fn times_at(&self, shares: &[f64]) -> Time {
        Time::Continuous(shares.iter().map(|share| (1.0 - share) as f32).collect())
    }

    fn noised(&self, x_start: Tensor, t: Time, noise: Tensor) -> Noised {
        let model_t = Tensor::from_slice(t.points()).to_device(x_start.device());
        let of_sample = model_t.view([-1, 1, 1, 1]);
        let x_t = &of_sample * &x_start + (1.0 - &of_sample) * &noise;
        Noised { x_start, x_t, noise, t, model_t }
    }

    fn losses(&self, output: &Tensor, noised: &Noised) -> SampleLosses {
        let predicted = output.narrow(1, 0, noised.x_t.size()[1]);
        let mse = sample_mean(&(predicted - noised.velocity()).square());
        SampleLosses::new(LossPart::new("mse", mse), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use data_loader::draws::Purpose;
    use tch::{Device, Kind};

    const UNIFORM: FlowMatching = FlowMatching { sampling: TimestepSampling::Uniform };

    fn draw(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    #[test]
    fn a_path_leads_from_noise_to_data_and_its_velocity_is_judged() {
        let (x_start, noise) = (draw(&[3, 2, 4, 4]), draw(&[3, 2, 4, 4]));
        let noised = UNIFORM.noised(x_start.copy(), Time::Continuous(vec![0.0, 1.0, 0.25]), noise.copy());
        assert!(noised.x_t.get(0).equal(&noise.get(0)) && noised.x_t.get(1).equal(&x_start.get(1)));
        let between = x_start.get(2) * 0.25 + noise.get(2) * 0.75;
        assert!((noised.x_t.get(2) - between).abs().max().double_value(&[]) < 1e-6);
        assert_eq!(Vec::<f32>::try_from(&noised.model_t).unwrap(), [0.0, 1.0, 0.25]);

        // The second half of a doubled output is nobody's business and gets no gradient.
        let velocity = &x_start - &noise;
        let output = Tensor::cat(&[&velocity + 0.5, draw(&[3, 2, 4, 4])], 1).set_requires_grad(true);
        let loss = UNIFORM.loss(&output, &noised).total;
        assert!((loss.double_value(&[]) - 0.25).abs() < 1e-5);
        let grad = Tensor::run_backward(&[loss], &[&output], false, false).remove(0);
        assert_eq!(grad.narrow(1, 2, 2).abs().max().double_value(&[]), 0.0);
        assert!((grad.narrow(1, 0, 2) - 1.0 / 96.0).abs().max().double_value(&[]) < 1e-6);
    }

    #[test]
    fn times_have_the_distribution_that_was_asked_for() {
        let key = Key::new(5, Purpose::Timestep, 1);
        let moments = |values: &[f64]| {
            let mean = values.iter().sum::<f64>() / values.len() as f64;
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / values.len() as f64;
            (mean, variance.sqrt())
        };
        let times = |sampling| {
            let Time::Continuous(times) = FlowMatching { sampling }.draw_times(20_000, key) else { panic!() };
            assert!(times.iter().all(|t| (0.0..=1.0).contains(t)));
            times.into_iter().map(f64::from).collect::<Vec<f64>>()
        };
        let (mean, std) = moments(&times(TimestepSampling::Uniform));
        assert!((mean - 0.5).abs() < 0.01 && (std - 12f64.sqrt().recip()).abs() < 0.005, "{mean} {std}");
        let logits = times(TimestepSampling::LogitNormal { mean: 0.5, std: 0.8 });
        let logits: Vec<f64> = logits.into_iter().map(|t| (t / (1.0 - t)).ln()).collect();
        let (mean, std) = moments(&logits);
        assert!((mean - 0.5).abs() < 0.02 && (std - 0.8).abs() < 0.02, "{mean} {std}");
    }

    #[test]
    fn shares_of_noise_count_from_data() {
        assert_eq!(UNIFORM.times_at(&[0.0, 0.75]), Time::Continuous(vec![1.0, 0.25]));
    }
}
