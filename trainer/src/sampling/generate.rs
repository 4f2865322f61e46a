use super::{Guidance, ModelTime, Sampler, SamplerOptions, SamplingError};
use crate::diffusion::Process;
use crate::model::{Model, WeightSet};
use data_loader::draws::{Key, Purpose, fill_normal};
use std::sync::Arc;
use tch::{Device, Tensor};

/// How samples are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SamplingOptions {
    /// The sampler.
    pub sampler: SamplerOptions,
    /// Classifier-free guidance.
    pub guidance: Guidance,
    /// Seed of all noise.
    pub seed: u64,
}

/// Draws samples whose content depends on the seed, each sample's number and its label, not on who draws them.
pub struct Generator {
    model: Arc<dyn Model>,
    sampler: Box<dyn Sampler>,
    guidance: Guidance,
    seed: u64,
    device: Device,
}

impl Generator {
    /// A generator for a model that was trained to reverse `process`.
    ///
    /// # Errors
    /// When sampler, steps or guidance do not fit process and model.
    pub fn new(
        model: Arc<dyn Model>,
        process: &Process,
        options: SamplingOptions,
        device: Device,
    ) -> Result<Self, SamplingError> {
        let SamplingOptions { sampler, guidance, seed } = options;
        if guidance.is_any() && model.null_label().is_none() {
            return Err(SamplingError::NoNullLabel);
        }
        Ok(Self { model, sampler: sampler.build(process)?, guidance, seed, device })
    }

    /// Latents (in the scale that the model was trained on) for samples number `first..first + labels.len()`.
    ///
    /// # Shapes
    /// `labels` N → [N, C, H, W].
    ///
    /// # Errors
    /// When a chain cannot be brought to its end or a sample is not finite.
    pub fn latents(&self, weights: &WeightSet, first: u64, labels: &[i64]) -> Result<Tensor, SamplingError> {
        let _no_grad = tch::no_grad_guard();
        let y = Tensor::from_slice(labels).to_device(self.device);
        let denoise = |x: &Tensor, time: &ModelTime| self.guidance.output((&*self.model, weights), x, time, &y);
        let numbers = first..first + labels.len() as u64;
        let noise = |purpose: Purpose, step: usize| self.noise(purpose, numbers.clone(), step);
        let start = noise(Purpose::SampleStart, 0);
        let mut step_noise = |step: usize| noise(Purpose::SampleStep, step);
        let latents = self.sampler.sample(start, &denoise, &mut step_noise, &mut |_| {})?;
        let finite = latents.isfinite().flatten(1, -1).all_dim(1, false).to_device(Device::Cpu);
        match (0..labels.len()).find(|&row| finite.int64_value(&[row as i64]) == 0) {
            Some(row) => Err(SamplingError::NotFinite { number: first + row as u64, label: labels[row] }),
            None => Ok(latents),
        }
    }

    /// The Gaussian of loop step `step` for each of the samples, every one with a key of its own.
    fn noise(&self, purpose: Purpose, numbers: std::ops::Range<u64>, step: usize) -> Tensor {
        let shape = self.model.latent_shape();
        let numel = shape.iter().product::<i64>() as usize;
        let mut values = vec![0f32; numel * (numbers.end - numbers.start) as usize];
        for (number, of_sample) in numbers.zip(values.chunks_mut(numel)) {
            fill_normal(Key::new(self.seed, purpose, number).index(step as u64), of_sample);
        }
        let shape: Vec<i64> = std::iter::once(-1).chain(shape.iter().copied()).collect();
        Tensor::from_slice(&values).view(shape.as_slice()).to_device(self.device)
    }
}
