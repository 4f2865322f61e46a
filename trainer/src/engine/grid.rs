//! Sample grids while training: fixed noise and labels, EMA weights, the images shared out over all ranks so that
//! nobody waits long.

use super::rank::Rank;
use crate::images::{Grid, ImageBatch};
use crate::model::Model;
use crate::recipe::Recipe;
use crate::sampling::{Generator, GuidedChannels, SamplerKind, SamplingOptions};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result};
use configs::RunConfig;
use configs::events::{Event, now};
use std::sync::Arc;
use tch::Device;

/// Draws the same grid again and again as the weights change.
pub struct SampleGrid {
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
        let options = SamplingOptions {
            kind: match sample.sampler {
                configs::Sampler::Ddim => SamplerKind::Ddim,
                configs::Sampler::Ddpm => SamplerKind::Ddpm,
            },
            steps: sample.steps,
            cfg_scale: sample.cfg_scale,
            channels: GuidedChannels::All,
            seed: sample.seed,
        };
        let generator = Generator::new(model, &recipe.process(), options, device)?;
        let classes = recipe.model.num_classes;
        let labels = (0..sample.num as i64).map(|number| number % classes).collect();
        Ok(Some(Self { generator, vae, labels, batch: sample.batch }))
    }

    /// Draws the grid of `step` on all ranks together; rank 0 keeps and shows it.
    ///
    /// # Errors
    /// What the collective, the VAE or the journal reports.
    pub fn draw(&self, rank: &mut Rank, step: u64) -> Result<()> {
        let weights = rank.stepper.gather_ema()?;
        let (mine, world_size) = (rank.collective.rank(), rank.collective.world_size());
        let scaling_factor = rank.recipe.dataset.scaling_factor;
        let mut pixels = Vec::new();
        let mut size = [0; 3];
        for (number, labels) in self.labels.chunks(self.batch).enumerate().skip(mine).step_by(world_size) {
            let first = (number * self.batch) as u64;
            let latents = self.generator.latents(&weights, first, labels) / scaling_factor;
            let images = ImageBatch::from_tensor(&self.vae.decode(&latents)?)?;
            size = [images.channels, images.height, images.width];
            pixels.extend(images.pixels);
        }
        let all = rank.collective.gather_bytes(&pixels)?;
        if mine != 0 {
            return Ok(());
        }
        // Rank 0 drew the first batch, so it knows the size; batches come back in the order in which they were dealt.
        let [channels, height, width] = size;
        let mut rest: Vec<&[u8]> = all.iter().map(Vec::as_slice).collect();
        let mut in_order = Vec::with_capacity(self.labels.len() * channels * height * width);
        for (number, labels) in self.labels.chunks(self.batch).enumerate() {
            let of_rank = &mut rest[number % world_size];
            let split = of_rank.split_at_checked(labels.len() * channels * height * width);
            let (batch, after) = split.context("a rank sent fewer sample images than it was dealt")?;
            in_order.extend_from_slice(batch);
            *of_rank = after;
        }
        let images = ImageBatch::new([self.labels.len(), channels, height, width], in_order)?;
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
