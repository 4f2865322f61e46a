use super::Tables;
use tch::Tensor;

/// What the first C channels of a model's output mean, in a Gaussian diffusion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise (Ho et al. 2020).
    Eps,
    /// The clean latent.
    XStart,
    /// √ᾱ·noise − √(1 − ᾱ)·x_start (Salimans & Ho 2022).
    V,
}

impl Prediction {
    /// What the output is compared with.
    ///
    /// # Shapes
    /// `x_start`, `noise` [N, C, H, W]; `t` N indices into `tables`.
    pub fn target(self, tables: &Tables, x_start: &Tensor, noise: &Tensor, t: &[usize]) -> Tensor {
        match self {
            Prediction::Eps => noise.shallow_clone(),
            Prediction::XStart => x_start.shallow_clone(),
            Prediction::V => {
                let gather = |table: &[f64]| Tables::gather(table, t, x_start.device());
                gather(&tables.sqrt_alphas_cumprod) * noise - gather(&tables.sqrt_one_minus_alphas_cumprod) * x_start
            }
        }
    }

    /// x_start as implied by an output.
    ///
    /// # Shapes
    /// `x_t`, `output` [N, C, H, W]; `t` N indices into `tables`.
    pub fn x_start(self, tables: &Tables, x_t: &Tensor, t: &[usize], output: &Tensor) -> Tensor {
        match self {
            Prediction::Eps => tables.x_start_from_eps(x_t, t, output),
            Prediction::XStart => output.shallow_clone(),
            Prediction::V => {
                let gather = |table: &[f64]| Tables::gather(table, t, x_t.device());
                gather(&tables.sqrt_alphas_cumprod) * x_t - gather(&tables.sqrt_one_minus_alphas_cumprod) * output
            }
        }
    }

    /// The weight of the squared error at ᾱ that min-SNR weighting gives: min(SNR, γ) for x_start, over SNR for eps, over
    /// SNR + 1 for v, with SNR = ᾱ/(1 − ᾱ). At ᾱ = 0 it is 0 for x_start and v.
    ///
    /// # Source
    /// Hang et al. 2023, section 3.4.
    pub fn min_snr_weight(self, alpha_cumprod: f64, gamma: f64) -> f64 {
        let (signal, noise) = (alpha_cumprod, 1.0 - alpha_cumprod);
        match self {
            Prediction::Eps => (gamma * noise / signal).min(1.0),
            Prediction::XStart => (signal / noise).min(gamma),
            Prediction::V => signal.min(gamma * noise),
        }
    }

    /// eps as implied by an output. Finite for v at zero signal-to-noise ratio, where x_start says nothing about it.
    ///
    /// # Shapes
    /// As [`Prediction::x_start`].
    pub fn eps(self, tables: &Tables, x_t: &Tensor, t: &[usize], output: &Tensor) -> Tensor {
        match self {
            Prediction::Eps => output.shallow_clone(),
            Prediction::XStart => tables.eps_from_x_start(x_t, t, output),
            Prediction::V => {
                let gather = |table: &[f64]| Tables::gather(table, t, x_t.device());
                gather(&tables.sqrt_one_minus_alphas_cumprod) * x_t + gather(&tables.sqrt_alphas_cumprod) * output
            }
        }
    }
}

/// The process that a model was trained to reverse: what a sampler has to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Process {
    /// A Gaussian diffusion in discrete time.
    Gaussian {
        /// β of every original timestep.
        betas: Vec<f64>,
        /// What the model predicts.
        prediction: Prediction,
    },
    /// The straight path x_t = t·x_start + (1 − t)·noise, of which the model predicts the velocity x_start − noise
    /// (Lipman et al. 2023; SiT).
    Flow,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::{Respacing, Schedule, zero_terminal_snr};
    use tch::{Device, Kind};

    #[test]
    fn every_prediction_leads_back_to_what_was_mixed() {
        let betas = Schedule::Linear.betas(1000);
        let tables = Tables::new(&betas, &Respacing::All.kept(1000).unwrap());
        let t = [0, 300, 700];
        tch::manual_seed(1);
        let draw = || Tensor::randn([3, 2, 4, 4], (Kind::Float, Device::Cpu));
        let (x_start, noise) = (draw(), draw());
        let x_t = tables.q_sample(&x_start, &t, &noise);
        for prediction in [Prediction::Eps, Prediction::XStart, Prediction::V] {
            let target = prediction.target(&tables, &x_start, &noise, &t);
            let close = |found: Tensor, expected: &Tensor| (found - expected).abs().max().double_value(&[]) < 1e-3;
            assert!(close(prediction.x_start(&tables, &x_t, &t, &target), &x_start), "{prediction:?}");
            assert!(close(prediction.eps(&tables, &x_t, &t, &target), &noise), "{prediction:?}");
        }
    }

    #[test]
    fn min_snr_weights_are_those_of_the_paper() {
        // min(SNR, 5) over SNR, over 1 and over SNR + 1 at ᾱ = 0.99 (SNR 99), 0.8 (4), 0.1 (1/9) and 0.
        let close = |found: f64, expected: f64| assert!((found - expected).abs() < 1e-12, "{found}, {expected}");
        let cases =
            [(0.99, 5.0 / 99.0, 5.0, 0.05), (0.8, 1.0, 4.0, 0.8), (0.1, 1.0, 1.0 / 9.0, 0.1), (0.0, 1.0, 0.0, 0.0)];
        for (alpha, eps, x_start, v) in cases {
            close(Prediction::Eps.min_snr_weight(alpha, 5.0), eps);
            close(Prediction::XStart.min_snr_weight(alpha, 5.0), x_start);
            close(Prediction::V.min_snr_weight(alpha, 5.0), v);
        }
    }

    #[test]
    fn pure_noise_is_no_trap_for_x_start_and_v() {
        let betas = zero_terminal_snr(&Schedule::Linear.betas(1000));
        let tables = Tables::new(&betas, &Respacing::All.kept(1000).unwrap());
        let draw = || Tensor::randn([2, 2, 4, 4], (Kind::Float, Device::Cpu));
        let (x_start, noise, t) = (draw(), draw(), [999, 998]);
        let x_t = tables.q_sample(&x_start, &t, &noise);
        assert!(x_t.get(0).equal(&noise.get(0)));
        let far = |found: Tensor, expected: &Tensor| (found - expected).abs().max().double_value(&[]);
        for prediction in [Prediction::XStart, Prediction::V] {
            let target = prediction.target(&tables, &x_start, &noise, &t);
            assert!(far(prediction.x_start(&tables, &x_t, &t, &target), &x_start) < 1e-6, "{prediction:?}");
            assert!(far(prediction.eps(&tables, &x_t, &t, &target), &noise) < 1e-6, "{prediction:?}");
        }
    }
}
