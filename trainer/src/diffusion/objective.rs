use super::vlb::sample_mean;
use super::{Tables, variational_bound};
use data_loader::draws::{Key, Purpose, fill_normal};
use rand_distr::{Distribution, Uniform};
use tch::Tensor;

/// A micro-batch with noise on it: what the model is given and what the loss needs.
pub struct Noised {
    /// Clean latents [N, C, H, W].
    pub x_start: Tensor,
    /// Noised latents.
    pub x_t: Tensor,
    /// The noise.
    pub noise: Tensor,
    /// Index into the diffusion's tables, one a sample.
    pub t: Vec<usize>,
    /// What the model reads as time, [N] float32.
    pub model_t: Tensor,
}

/// A loss with its parts.
pub struct LossTerms {
    /// What is differentiated: the mean over the micro-batch, a scalar.
    pub total: Tensor,
    /// Named parts of it for the log, scalars, detached.
    pub parts: Vec<(&'static str, Tensor)>,
}

/// What a model is trained to do: how inputs are noised and how an output is judged.
pub trait Objective: Send + Sync {
    /// Draws time and noise for the micro-batch of (seed, step, lane) and applies them.
    ///
    /// # Shapes
    /// `x_start` [N, C, H, W].
    fn noise(&self, x_start: Tensor, seed: u64, step: u64, lane: usize) -> Noised;
    /// Judges the model's output for `noised`.
    fn loss(&self, output: &Tensor, noised: &Noised) -> LossTerms;
}

/// Predict eps; with `learn_sigma` the variance as well: L = mean (eps − eps_θ)² + L_vlb, where L_vlb sees a detached
/// eps (Nichol & Dhariwal 2021, section 3.1; DiT trains with this sum, unscaled).
pub struct VariationalEps {
    /// The diffusion.
    pub tables: Tables,
    /// Whether the output has a second half for the variance.
    pub learn_sigma: bool,
}

impl VariationalEps {
    /// Noises with given draws.
    pub fn noise_with(&self, x_start: Tensor, t: Vec<usize>, noise: Tensor) -> Noised {
        let x_t = self.tables.q_sample(&x_start, &t, &noise);
        let model_t = self.tables.model_t(&t, x_start.device());
        Noised { x_start, x_t, noise, t, model_t }
    }

    /// mse and (with `learn_sigma`) vb of every sample, [N] each.
    pub fn per_sample(&self, output: &Tensor, noised: &Noised) -> (Tensor, Option<Tensor>) {
        if !self.learn_sigma {
            return (sample_mean(&(&noised.noise - output).square()), None);
        }
        let halves = output.chunk(2, 1);
        let (eps, variance) = (&halves[0], &halves[1]);
        let mse = sample_mean(&(&noised.noise - eps).square());
        let bound = variational_bound(&self.tables, &noised.x_start, &noised.x_t, &noised.t, &eps.detach(), variance);
        (mse, Some(bound.bound_bits))
    }
}

impl Objective for VariationalEps {
    fn noise(&self, x_start: Tensor, seed: u64, step: u64, lane: usize) -> Noised {
        let samples = x_start.size()[0] as usize;
        let key = |purpose| Key::new(seed, purpose, step).lane(lane);
        let mut rng = key(Purpose::Timestep).rng();
        let t = match Uniform::new(0, self.tables.timesteps()) {
            Ok(uniform) => (0..samples).map(|_| uniform.sample(&mut rng)).collect(),
            Err(_) => vec![0; samples],
        };
        let mut noise = vec![0f32; x_start.numel()];
        fill_normal(key(Purpose::Noise), &mut noise);
        let noise = Tensor::from_slice(&noise).view_as(&x_start).to_device(x_start.device());
        self.noise_with(x_start, t, noise)
    }

    fn loss(&self, output: &Tensor, noised: &Noised) -> LossTerms {
        let (mse, vb) = self.per_sample(output, noised);
        let mse = mse.mean(None);
        let mut parts = vec![("mse", mse.detach())];
        let total = match vb.map(|vb| vb.mean(None)) {
            Some(vb) => {
                parts.push(("vb", vb.detach()));
                mse + vb
            }
            None => mse,
        };
        LossTerms { total, parts }
    }
}
