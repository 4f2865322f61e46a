//! Sample grids while training: fixed noise and labels, EMA weights, the images shared out over all ranks so that
//! nobody waits long.

use super::rank::Rank;
use super::share::share_out;
use crate::diffusion::Process;
use crate::images::{Grid, ImageBatch};
use crate::model::Model;
use crate::recipe::Recipe;
use crate::sampling::{Generator, Guidance, SamplerKind, SamplerOptions, SamplingOptions};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result};
use configs::RunConfig;
use configs::events::{Event, now};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Draws the same grid again and again as the weights change.
pub struct SampleGrid {
    model: Arc<dyn Model>,
    device: Device,
    generator: Generator,
    vae: AutoencoderKl,
    labels: Vec<i64>,
    batch: usize,
}

impl SampleGrid {
    /// The grid that the config asks for; `None` when it asks for none.
    ///
    /// # Errors
    /// When the VAE cannot be loaded.
    pub fn from_config(
        config: &RunConfig,
        recipe: &Recipe,
        model: Arc<dyn Model>,
        device: Device,
    ) -> Result<Option<Self>> {
        let sample = &config.sample;
        let (Some(vae), true) = (&sample.vae, sample.every_steps > 0) else { return Ok(None) };
        let vae = AutoencoderKl::load(vae, device).context("`sample.vae`")?;
        if let Some(warning) = recipe.check_vae(&vae).context("`sample.vae`")? {
            eprintln!("trainer: warning: `sample.vae`: {warning}");
        }
        let process = recipe.process();
        let is_flow = matches!(process, Process::Flow);
        let kind = sample.sampler.unwrap_or(SamplerKind::default_of_grids(is_flow));
        let options = SamplingOptions {
            sampler: SamplerOptions {
                eta: sample.eta,
                clip_denoised: sample.clip_denoised,
                ..SamplerOptions::new(kind, sample.steps)
            },
            guidance: Guidance {
                scale: sample.cfg_scale,
                channels: sample.cfg_channels,
                interval: sample.cfg_interval,
            },
            seed: sample.seed,
        };
        let generator = Generator::new(model.clone(), &process, options, device).context("`sample.sampler`")?;
        let classes = recipe.model.num_classes;
        let labels = (0..sample.num as i64).map(|number| number % classes).collect();
        Ok(Some(Self { model, device, generator, vae, labels, batch: sample.batch }))
    }

    /// Draws the grid of `step` on all ranks together; rank 0 keeps and shows it.
    ///
    /// # Errors
    /// What the collective, the VAE or the journal reports.
    pub fn draw(&self, rank: &mut Rank, step: u64) -> Result<()> {
        let weights = rank.stepper.gather_ema()?;
        let scaling_factor = rank.recipe.dataset.scaling_factor;
        let mut draw = |number: usize| {
            let labels = &self.labels[number * self.batch..self.labels.len().min((number + 1) * self.batch)];
            let first = (number * self.batch) as u64;
            // A picture that cannot be drawn must not end the run.
            let latents = self.generator.latents(&weights, first, labels).unwrap_or_else(|error| {
                eprintln!("trainer: warning: sample grid of step {step}: {error}; gray images in its place");
                let shape = [&[labels.len() as i64], self.model.latent_shape()].concat();
                Tensor::zeros(shape, (Kind::Float, self.device))
            });
            let latents = latents / scaling_factor;
            Ok(ImageBatch::from_tensor(&self.vae.decode(&latents)?)?)
        };
        let mut all: Option<ImageBatch> = None;
        let mut take = |batch: ImageBatch| match &mut all {
            None => {
                all = Some(batch);
                Ok(())
            }
            Some(all) => Ok(all.append(batch)?),
        };
        share_out(&*rank.collective, self.labels.len().div_ceil(self.batch), &mut draw, &mut take)?;
        let Some(images) = all else { return Ok(()) };
        let columns = (rank.recipe.model.num_classes as usize).clamp(1, 10);
        let grid = Grid::new(&images, columns, 2)?;
        if let Some(journal) = &mut rank.journal {
            let name = format!("samples/step-{step:09}.png");
            let path = journal.image(step, &name, "samples/ema", &grid.to_png()?, (grid.width, grid.height))?;
            rank.tell(|_| Event::Sample { step, path, time: now() })?;
        }
        Ok(())
    }
}
