use super::{Ddim, Ddpm, GuidedChannels, Sampler, forward_with_cfg, sample_loop};
use crate::diffusion::{Respacing, RespacingError, Schedule, Tables};
use crate::model::{Model, WeightSet, no_probe};
use data_loader::draws::{Key, Purpose, fill_normal};
use std::sync::Arc;
use tch::{Device, Tensor};

/// A named sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SamplerKind {
    /// [`Ddpm`], respaced.
    Ddpm,
    /// [`Ddim`] with eta 0, respaced.
    Ddim,
}

/// Draws samples whose content depends on the seed, each sample's number and its label, not on who draws them.
pub struct Generator {
    model: Arc<dyn Model>,
    tables: Tables,
    sampler: Box<dyn Sampler>,
    cfg_scale: f64,
    channels: GuidedChannels,
    seed: u64,
    device: Device,
}

impl Generator {
    /// A generator of `steps` denoising steps over a schedule of `timesteps`. A `cfg_scale` of 1 samples without
    /// guidance.
    ///
    /// # Errors
    /// When the steps do not fit the schedule.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        model: Arc<dyn Model>,
        schedule: Schedule,
        timesteps: usize,
        kind: SamplerKind,
        steps: usize,
        cfg_scale: f64,
        channels: GuidedChannels,
        seed: u64,
        device: Device,
    ) -> Result<Self, RespacingError> {
        let kept = Respacing::Sections(vec![steps]).kept(timesteps)?;
        let tables = Tables::new(&schedule.betas(timesteps), &kept);
        let sampler: Box<dyn Sampler> = match kind {
            SamplerKind::Ddpm => Box::new(Ddpm::default()),
            SamplerKind::Ddim => Box::new(Ddim::default()),
        };
        Ok(Self { model, tables, sampler, cfg_scale, channels, seed, device })
    }

    /// Latents (in the scale that the model was trained on) for samples number `first..first + labels.len()`.
    ///
    /// # Shapes
    /// `labels` N → [N, C, H, W].
    pub fn latents(&self, weights: &WeightSet, first: u64, labels: &[i64]) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let model = &*self.model;
        let numbers = first..first + labels.len() as u64;
        let noise = |purpose: Purpose, step: usize| {
            let of_sample = |number: u64| {
                let mut values = vec![0f32; model.latent_shape().iter().product::<i64>() as usize];
                fill_normal(Key::new(self.seed, purpose, number).index(step as u64), &mut values);
                Tensor::from_slice(&values).view(model.latent_shape())
            };
            Tensor::stack(&numbers.clone().map(of_sample).collect::<Vec<_>>(), 0).to_device(self.device)
        };
        let y = Tensor::from_slice(labels).to_device(self.device);
        let guided = model.null_label().filter(|_| self.cfg_scale != 1.0);
        let denoise = |x: &Tensor, t: &Tensor| match guided {
            None => weights.forward(model, x, t, &y, &mut no_probe),
            Some(null_label) => {
                let labels = Tensor::cat(&[&y, &y.full_like(null_label)], 0);
                let (x, t) = (Tensor::cat(&[x, x], 0), Tensor::cat(&[t, t], 0));
                let output = forward_with_cfg(model, weights, &x, &t, &labels, self.cfg_scale, self.channels);
                output.narrow(0, 0, y.size()[0])
            }
        };
        let mut step_noise = |step: usize| noise(Purpose::SampleStep, step);
        let start = noise(Purpose::SampleStart, 0);
        sample_loop(&self.tables, &*self.sampler, start, &denoise, &mut step_noise, &mut |_| {})
    }
}
