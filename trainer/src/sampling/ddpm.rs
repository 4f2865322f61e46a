use super::{Chain, Denoise, Sampler, SamplingError, Step};
use tch::Tensor;

/// Ancestral sampling (Ho et al. 2020, algorithm 2) with the learned variance where the model has one, else β_t.
pub struct Ddpm {
    /// The timesteps.
    pub chain: Chain,
}

impl Ddpm {
    /// log of the variance added at `index`.
    fn log_variance(&self, index: usize, output: &Tensor, channels: i64) -> Tensor {
        let tables = &self.chain.tables;
        if output.size()[1] == 2 * channels {
            return crate::diffusion::learned_log_variance(tables, &[index], &output.narrow(1, channels, channels));
        }
        Tensor::from(tables.betas[index].ln() as f32).to_device(output.device())
    }
}

impl Sampler for Ddpm {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let tables = &self.chain.tables;
        let (samples, channels) = (start.size()[0], start.size()[1]);
        let mut x = start;
        for (number, index) in (0..tables.timesteps()).rev().enumerate() {
            let output = denoise(&x, &self.chain.time(index, samples, x.device()));
            let x_start = self.chain.x_start(index, &x, &output);
            x = tables.posterior_mean(&x_start, &x, &[index]);
            // The last mean is the sample.
            if index > 0 {
                x += (self.log_variance(index, &output, channels) * 0.5).exp() * noise(number);
            }
            observe(Step { number, t: tables.timestep_map[index] as f64, x: &x, pred_xstart: Some(&x_start) });
        }
        Ok(x)
    }
}
