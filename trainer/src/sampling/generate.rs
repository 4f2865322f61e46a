use super::{Ddim, Ddpm, GuidedChannels, Sampler, forward_with_cfg, sample_loop};
use crate::diffusion::{Process, Respacing, RespacingError, Tables};
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

/// How samples are drawn.
#[derive(Clone, Copy, Debug)]
pub struct SamplingOptions {
    /// The sampler.
    pub kind: SamplerKind,
    /// Denoising steps.
    pub steps: usize,
    /// Classifier-free guidance scale; 1 is none.
    pub cfg_scale: f64,
    /// What guidance acts on.
    pub channels: GuidedChannels,
    /// Seed of all noise.
    pub seed: u64,
}

/// Draws samples whose content depends on the seed, each sample's number and its label, not on who draws them.
pub struct Generator {
    model: Arc<dyn Model>,
    tables: Tables,
    sampler: Box<dyn Sampler>,
    options: SamplingOptions,
    device: Device,
}

impl Generator {
    /// A generator for a model that was trained to reverse `process`.
    ///
    /// # Errors
    /// When the steps do not fit the diffusion.
    pub fn new(
        model: Arc<dyn Model>,
        process: &Process,
        options: SamplingOptions,
        device: Device,
    ) -> Result<Self, RespacingError> {
        let Process::Gaussian { betas, .. } = process else { unimplemented!() };
        let kept = Respacing::Sections(vec![options.steps]).kept(betas.len())?;
        let sampler: Box<dyn Sampler> = match options.kind {
            SamplerKind::Ddpm => Box::new(Ddpm::default()),
            SamplerKind::Ddim => Box::new(Ddim::default()),
        };
        Ok(Self { model, tables: Tables::new(betas, &kept), sampler, options, device })
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
                fill_normal(Key::new(self.options.seed, purpose, number).index(step as u64), &mut values);
                Tensor::from_slice(&values).view(model.latent_shape())
            };
            Tensor::stack(&numbers.clone().map(of_sample).collect::<Vec<_>>(), 0).to_device(self.device)
        };
        let y = Tensor::from_slice(labels).to_device(self.device);
        let guided = model.null_label().filter(|_| self.options.cfg_scale != 1.0);
        let denoise = |x: &Tensor, t: &Tensor| match guided {
            None => weights.forward(model, x, t, &y, &mut no_probe),
            Some(null_label) => {
                let labels = Tensor::cat(&[&y, &y.full_like(null_label)], 0);
                let (x, t) = (Tensor::cat(&[x, x], 0), Tensor::cat(&[t, t], 0));
                let output =
                    forward_with_cfg(model, weights, &x, &t, &labels, self.options.cfg_scale, self.options.channels);
                output.narrow(0, 0, y.size()[0])
            }
        };
        let mut step_noise = |step: usize| noise(Purpose::SampleStep, step);
        let start = noise(Purpose::SampleStart, 0);
        sample_loop(&self.tables, &*self.sampler, start, &denoise, &mut step_noise, &mut |_| {})
    }
}
