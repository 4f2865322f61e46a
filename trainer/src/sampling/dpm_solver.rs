use super::{Chain, Denoise, Sampler, SamplingError, Step};
use crate::diffusion::Prediction;
use tch::Tensor;

/// DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): exponential integrator over λ = ln(α/σ) of the
/// predicted x_start, second order from the last two predictions.
///
/// The first step is of first order because it has no history, the last one because it ends at σ = 0, where λ is
/// infinite. These are the choices of diffusers' `DPMSolverMultistepScheduler` with its defaults (`solver_order` 2,
/// `dpmsolver++`, `midpoint`, `lower_order_final`, `final_sigmas_type` zero, `timestep_spacing` linspace).
pub struct DpmSolver {
    chain: Chain,
}

impl DpmSolver {
    /// The timesteps of a chain of so many steps: `steps` + 1 equally spaced points from 0 to the last timestep, rounded
    /// half to even, without the lowest, which stands for the clean data. Ascending.
    pub fn timesteps(steps: usize, of: usize) -> Vec<usize> {
        let stride = of.saturating_sub(1) as f64 / steps as f64;
        (1..=steps).map(|point| (point as f64 * stride).round_ties_even() as usize).collect()
    }

    /// A chain of `steps` steps, at most one fewer than there are `betas`.
    ///
    /// # Errors
    /// [`SamplingError::Steps`].
    pub fn new(
        betas: &[f64],
        steps: usize,
        prediction: Prediction,
        clip_denoised: bool,
    ) -> Result<Self, SamplingError> {
        let most = betas.len().saturating_sub(1);
        if steps == 0 || steps > most {
            return Err(SamplingError::Steps { sampler: configs::Sampler::DpmSolver, steps, most });
        }
        let kept = Self::timesteps(steps, betas.len());
        Ok(Self { chain: Chain::new(betas, &kept, prediction, clip_denoised) })
    }

    /// α = √ᾱ and σ = √(1 − ᾱ) before (at `index`) and after the step.
    fn ends(&self, index: usize) -> [(f64, f64); 2] {
        let of = |ab: f64| (ab.sqrt(), (1.0 - ab).sqrt());
        let tables = &self.chain.tables;
        [of(tables.alphas_cumprod[index]), of(tables.alphas_cumprod_prev[index])]
    }
}

impl Sampler for DpmSolver {
    fn sample(
        &self,
        start: Tensor,
        denoise: Denoise,
        _noise: &mut dyn FnMut(usize) -> Tensor,
        observe: &mut dyn FnMut(Step),
    ) -> Result<Tensor, SamplingError> {
        let tables = &self.chain.tables;
        let samples = start.size()[0];
        let lambda = |(alpha, sigma): (f64, f64)| (alpha / sigma).ln();
        let mut x = start;
        // The prediction before this one, and the λ that it was made at.
        let mut last: Option<(Tensor, f64)> = None;
        for (number, index) in (0..tables.timesteps()).rev().enumerate() {
            let output = denoise(&x, &self.chain.time(index, samples, x.device()));
            let x_start = self.chain.x_start(index, &x, &output);
            let [from @ (alpha_from, sigma_from), to @ (alpha_to, sigma_to)] = self.ends(index);
            let (h, here) = (lambda(to) - lambda(from), lambda(from));
            let estimate = match &last {
                // (m0 − m1) / r0 / 2 with r0 = h0 / h; at zero signal-to-noise ratio h0 is infinite and the term is 0.
                Some((before, there)) if index > 0 => &x_start + (&x_start - before) * (h / (here - there) / 2.0),
                _ => x_start.shallow_clone(),
            };
            // σ_t/σ_s·x − α_t·(e^−h − 1)·D, where α_t·e^−h = σ_t·α_s/σ_s.
            x = x * (sigma_to / sigma_from) + estimate * (alpha_to - sigma_to * alpha_from / sigma_from);
            observe(Step { number, t: tables.timestep_map[index] as f64, x: &x, pred_xstart: Some(&x_start) });
            last = Some((x_start, here));
        }
        Ok(x)
    }
}
