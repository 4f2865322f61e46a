//! Pictures drawn with the weights of the moment, by the settings of `[sample]`.

use crate::diffusion::Process;
use crate::images::ImageBatch;
use crate::model::{Model, WeightSet};
use crate::recipe::Recipe;
use crate::sampling::{Generator, Guidance, SamplerKind, SamplerOptions, SamplingOptions};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result};
use configs::RunConfig;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use tch::{Device, Tensor};

/// Draws latents and decodes them.
pub struct Drawer {
    generator: Generator,
    vae: AutoencoderKl,
    scaling_factor: f64,
    num_classes: i64,
    /// Pictures that are drawn at once.
    pub batch: usize,
}

impl Drawer {
    /// A drawer for a run; `None` when its config asks for no pictures.
    ///
    /// # Errors
    /// When the VAE cannot be loaded, or the sampler does not fit the diffusion.
    pub fn from_config(
        config: &RunConfig,
        recipe: &Recipe,
        model: Arc<dyn Model>,
        device: Device,
    ) -> Result<Option<Rc<Self>>> {
        let sample = &config.sample;
        let (Some(vae), true) = (&sample.vae, sample.every_steps > 0 || config.fid.is_some()) else { return Ok(None) };
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
        let generator = Generator::new(model, &process, options, device).context("`sample.sampler`")?;
        let (scaling_factor, num_classes) = (recipe.dataset.scaling_factor, recipe.model.num_classes);
        Ok(Some(Rc::new(Self { generator, vae, scaling_factor, num_classes, batch: sample.batch })))
    }

    /// Pictures number `range`, whose classes follow each other in turn; the same for the same weights.
    ///
    /// # Errors
    /// A picture that cannot be drawn: a solver that finds no way, no memory.
    pub fn draw(&self, weights: &WeightSet, range: Range<usize>) -> Result<ImageBatch> {
        let labels: Vec<i64> = range.clone().map(|number| number as i64 % self.num_classes).collect();
        let latents = self.generator.latents(weights, range.start as u64, &labels)?;
        self.decode(&latents)
    }

    /// # Shapes
    /// `latents` `[N, C, H, W]` in the scale that the model was trained on.
    ///
    /// # Errors
    /// What the VAE reports.
    pub fn decode(&self, latents: &Tensor) -> Result<ImageBatch> {
        Ok(ImageBatch::from_tensor(&self.vae.decode(&(latents / self.scaling_factor))?)?)
    }
}
