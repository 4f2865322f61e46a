use super::{Chain, Denoise, Sampler, SamplingError, Step};
use tch::Tensor;

/// DDIM (Song et al. 2021, equation 12).
pub struct Ddim {
    /// The timesteps.
    pub chain: Chain,
    /// Share of the ancestral noise; 0 is deterministic.
    pub eta: f64,
}

impl Sampler for Ddim {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let tables = &self.chain.tables;
        let samples = start.size()[0];
        let mut x = start;
        for (number, index) in (0..tables.timesteps()).rev().enumerate() {
            let output = denoise(&x, &self.chain.time(index, samples, x.device()));
            let x_start = self.chain.x_start(index, &x, &output);
            let (ab, ab_prev) = (tables.alphas_cumprod[index], tables.alphas_cumprod_prev[index]);
            // From x_start, which may have been clamped; in this form it holds at zero signal-to-noise ratio too.
            let eps = (&x - &x_start * ab.sqrt()) / (1.0 - ab).sqrt();
            let sigma = self.eta * ((1.0 - ab_prev) / (1.0 - ab)).sqrt() * (1.0 - ab / ab_prev).sqrt();
            x = &x_start * ab_prev.sqrt() + eps * (1.0 - ab_prev - sigma * sigma).max(0.0).sqrt();
            if index > 0 && sigma > 0.0 {
                x += noise(number) * sigma;
            }
            observe(Step { number, t: tables.timestep_map[index] as f64, x: &x, pred_xstart: Some(&x_start) });
        }
        Ok(x)
    }
}
