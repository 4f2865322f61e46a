use crate::diffusion::Tables;
use tch::Tensor;

/// One step of a reverse chain.
pub trait Sampler: Send + Sync {
    /// From x_t to (x_{t−1}, predicted x_start).
    ///
    /// # Shapes
    /// `x_t`, `noise` [N, C, H, W]; `output` [N, C or 2C, H, W]; `index` below the number of timesteps.
    fn step(&self, tables: &Tables, index: usize, x_t: &Tensor, output: &Tensor, noise: &Tensor) -> (Tensor, Tensor);
}

/// Ancestral sampling (Ho et al. 2020, algorithm 2) with the learned variance where the model has one, else β_t.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ddpm {
    /// Clamp the predicted x_start to −1..1. The official scripts do not: latents are not bounded.
    pub clip_denoised: bool,
}

/// DDIM (Song et al. 2021, equation 12).
#[derive(Clone, Copy, Debug, Default)]
pub struct Ddim {
    /// Share of the ancestral noise; 0 is deterministic.
    pub eta: f64,
    /// As [`Ddpm::clip_denoised`].
    pub clip_denoised: bool,
}

/// eps (the first half of a doubled output) and x_start predicted from it.
fn predicted_x_start(tables: &Tables, t: &[usize], x_t: &Tensor, output: &Tensor, clip: bool) -> Tensor {
    let eps = output.narrow(1, 0, x_t.size()[1]);
    let x_start = tables.x_start_from_eps(x_t, t, &eps);
    if clip { x_start.clamp(-1.0, 1.0) } else { x_start }
}

impl Sampler for Ddpm {
    fn step(&self, tables: &Tables, index: usize, x_t: &Tensor, output: &Tensor, noise: &Tensor) -> (Tensor, Tensor) {
        let (t, channels) = ([index], x_t.size()[1]);
        let x_start = predicted_x_start(tables, &t, x_t, output, self.clip_denoised);
        let mean = tables.posterior_mean(&x_start, x_t, &t);
        let log_variance = if output.size()[1] == 2 * channels {
            crate::diffusion::learned_log_variance(tables, &t, &output.narrow(1, channels, channels))
        } else {
            // Without a learned variance: β, at t = 0 the posterior's at 1.
            let fixed =
                if index == 0 { tables.posterior_variance[1.min(tables.timesteps() - 1)] } else { tables.betas[index] };
            Tensor::from(fixed.ln() as f32).to_device(x_t.device())
        };
        if index == 0 {
            return (mean, x_start);
        }
        (mean + (log_variance * 0.5).exp() * noise, x_start)
    }
}

impl Sampler for Ddim {
    fn step(&self, tables: &Tables, index: usize, x_t: &Tensor, output: &Tensor, noise: &Tensor) -> (Tensor, Tensor) {
        let t = [index];
        let x_start = predicted_x_start(tables, &t, x_t, output, self.clip_denoised);
        let eps = tables.eps_from_x_start(x_t, &t, &x_start);
        let (ab, ab_prev) = (tables.alphas_cumprod[index], tables.alphas_cumprod_prev[index]);
        let sigma = self.eta * ((1.0 - ab_prev) / (1.0 - ab)).sqrt() * (1.0 - ab / ab_prev).sqrt();
        let mean = &x_start * ab_prev.sqrt() + eps * (1.0 - ab_prev - sigma * sigma).max(0.0).sqrt();
        if index == 0 || sigma == 0.0 {
            return (mean, x_start);
        }
        (mean + noise * sigma, x_start)
    }
}

/// What a sampling loop has after one step.
pub struct LoopStep<'a> {
    /// Steps made before this one.
    pub number: usize,
    /// The timestep that the model was given.
    pub model_t: i64,
    /// x_{t−1}.
    pub x: &'a Tensor,
    /// The x_start predicted in this step.
    pub pred_xstart: &'a Tensor,
}

/// Runs the whole reverse chain from `x`, highest noise first.
///
/// `denoise` gets x_t and the timestep [N]; `noise` gives the Gaussian of loop step k; `observe` sees every step.
pub fn sample_loop(
    tables: &Tables,
    sampler: &dyn Sampler,
    mut x: Tensor,
    denoise: &dyn Fn(&Tensor, &Tensor) -> Tensor,
    noise: &mut dyn FnMut(usize) -> Tensor,
    observe: &mut dyn FnMut(LoopStep),
) -> Tensor {
    let samples = x.size()[0] as usize;
    for (number, index) in (0..tables.timesteps()).rev().enumerate() {
        let model_t = tables.model_t(&vec![index; samples], x.device());
        let output = denoise(&x, &model_t);
        let (next, pred_xstart) = sampler.step(tables, index, &x, &output, &noise(number));
        x = next;
        observe(LoopStep { number, model_t: tables.timestep_map[index], x: &x, pred_xstart: &pred_xstart });
    }
    x
}
