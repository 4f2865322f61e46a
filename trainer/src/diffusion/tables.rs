use tch::{Device, Tensor};

/// Everything that is tabulated over the timesteps of a Gaussian diffusion, in float64.
///
/// # Source
/// Ho et al. 2020, equations 4–7; Nichol & Dhariwal 2021 for the learned variance range.
#[derive(Clone, Debug)]
pub struct Tables {
    /// β_t.
    pub betas: Vec<f64>,
    /// log β_t, the upper end of the learned log-variance.
    pub log_betas: Vec<f64>,
    /// ᾱ_t.
    pub alphas_cumprod: Vec<f64>,
    /// ᾱ_{t−1}, 1 at t = 0.
    pub alphas_cumprod_prev: Vec<f64>,
    /// ᾱ_{t+1}, 0 at the last t.
    pub alphas_cumprod_next: Vec<f64>,
    /// √ᾱ_t.
    pub sqrt_alphas_cumprod: Vec<f64>,
    /// √(1 − ᾱ_t).
    pub sqrt_one_minus_alphas_cumprod: Vec<f64>,
    /// log(1 − ᾱ_t).
    pub log_one_minus_alphas_cumprod: Vec<f64>,
    /// √(1/ᾱ_t); infinite where ᾱ_t = 0, as the next.
    pub sqrt_recip_alphas_cumprod: Vec<f64>,
    /// √(1/ᾱ_t − 1).
    pub sqrt_recipm1_alphas_cumprod: Vec<f64>,
    /// Variance of q(x_{t−1} | x_t, x_0).
    pub posterior_variance: Vec<f64>,
    /// Its logarithm, the value at 0 replaced by the one at 1; the lower end of the learned log-variance.
    pub posterior_log_variance_clipped: Vec<f64>,
    /// Weight of x_0 in the posterior mean.
    pub posterior_mean_coef1: Vec<f64>,
    /// Weight of x_t in the posterior mean.
    pub posterior_mean_coef2: Vec<f64>,
    /// The original timestep that the model is given at each index.
    pub timestep_map: Vec<i64>,
}

impl Tables {
    /// The tables of a chain over the original timesteps `kept` (ascending) of a schedule.
    pub fn new(original_betas: &[f64], kept: &[usize]) -> Self {
        let cumprod = |values: &[f64]| {
            let step = |product: &mut f64, beta: &f64| {
                *product *= 1.0 - beta;
                Some(*product)
            };
            values.iter().scan(1.0, step).collect::<Vec<f64>>()
        };
        let original_cumprod = cumprod(original_betas);
        let mut last = 1.0;
        let rebuild = |&i: &usize| {
            let beta = 1.0 - original_cumprod[i] / last;
            last = original_cumprod[i];
            beta
        };
        // Rebuilt from ᾱ even when every timestep is kept, as the official code does.
        let betas: Vec<f64> = kept.iter().map(rebuild).collect();
        let ac = cumprod(&betas);
        let n = betas.len();
        let prev: Vec<f64> = std::iter::once(1.0).chain(ac.iter().copied()).take(n).collect();
        let next: Vec<f64> = ac.iter().copied().skip(1).chain(std::iter::once(0.0)).collect();
        let of = |f: &dyn Fn(usize) -> f64| (0..n).map(f).collect::<Vec<f64>>();
        let posterior_variance = of(&|i| betas[i] * (1.0 - prev[i]) / (1.0 - ac[i]));
        Self {
            log_betas: of(&|i| betas[i].ln()),
            sqrt_alphas_cumprod: of(&|i| ac[i].sqrt()),
            sqrt_one_minus_alphas_cumprod: of(&|i| (1.0 - ac[i]).sqrt()),
            log_one_minus_alphas_cumprod: of(&|i| (1.0 - ac[i]).ln()),
            sqrt_recip_alphas_cumprod: of(&|i| (1.0 / ac[i]).sqrt()),
            sqrt_recipm1_alphas_cumprod: of(&|i| (1.0 / ac[i] - 1.0).sqrt()),
            posterior_log_variance_clipped: of(&|i| posterior_variance[if i == 0 { 1.min(n - 1) } else { i }].ln()),
            posterior_mean_coef1: of(&|i| betas[i] * prev[i].sqrt() / (1.0 - ac[i])),
            posterior_mean_coef2: of(&|i| (1.0 - prev[i]) * (1.0 - betas[i]).sqrt() / (1.0 - ac[i])),
            timestep_map: kept.iter().map(|&i| i as i64).collect(),
            alphas_cumprod: ac,
            alphas_cumprod_prev: prev,
            alphas_cumprod_next: next,
            posterior_variance,
            betas,
        }
    }

    /// How many timesteps the chain has.
    pub fn timesteps(&self) -> usize {
        self.betas.len()
    }

    /// `table` at each sample's index, ready to multiply a batch.
    ///
    /// # Shapes
    /// `t` N indices below [`Tables::timesteps`] → [N, 1, 1, 1] float32.
    pub fn gather(table: &[f64], t: &[usize], device: Device) -> Tensor {
        let values: Vec<f32> = t.iter().map(|&t| table[t] as f32).collect();
        Tensor::from_slice(&values).view([-1, 1, 1, 1]).to_device(device)
    }

    /// The timestep that the model is given for each sample's index.
    ///
    /// # Shapes
    /// N indices → `[N]` float32.
    pub fn model_t(&self, t: &[usize], device: Device) -> Tensor {
        let values: Vec<f32> = t.iter().map(|&t| self.timestep_map[t] as f32).collect();
        Tensor::from_slice(&values).to_device(device)
    }

    /// x_t = √ᾱ_t·x_start + √(1 − ᾱ_t)·noise.
    ///
    /// # Shapes
    /// `x_start`, `noise` [N, C, H, W]; `t` N indices.
    pub fn q_sample(&self, x_start: &Tensor, t: &[usize], noise: &Tensor) -> Tensor {
        let gather = |table: &[f64]| Self::gather(table, t, x_start.device());
        gather(&self.sqrt_alphas_cumprod) * x_start + gather(&self.sqrt_one_minus_alphas_cumprod) * noise
    }

    /// Mean of q(x_{t−1} | x_t, x_start).
    pub fn posterior_mean(&self, x_start: &Tensor, x_t: &Tensor, t: &[usize]) -> Tensor {
        let gather = |table: &[f64]| Self::gather(table, t, x_start.device());
        gather(&self.posterior_mean_coef1) * x_start + gather(&self.posterior_mean_coef2) * x_t
    }

    /// x_start as predicted from eps. Infinite at zero signal-to-noise ratio, where eps says nothing about it.
    pub fn x_start_from_eps(&self, x_t: &Tensor, t: &[usize], eps: &Tensor) -> Tensor {
        let gather = |table: &[f64]| Self::gather(table, t, x_t.device());
        gather(&self.sqrt_recip_alphas_cumprod) * x_t - gather(&self.sqrt_recipm1_alphas_cumprod) * eps
    }

    /// eps as implied by a predicted x_start. Finite at zero signal-to-noise ratio, where it is x_t.
    pub fn eps_from_x_start(&self, x_t: &Tensor, t: &[usize], x_start: &Tensor) -> Tensor {
        let gather = |table: &[f64]| Self::gather(table, t, x_t.device());
        (x_t - gather(&self.sqrt_alphas_cumprod) * x_start) / gather(&self.sqrt_one_minus_alphas_cumprod)
    }
}
