//! Sample grids while training: fixed noise and labels, EMA weights, the images shared out over all ranks so that
//! nobody waits long.

use super::between::BetweenSteps;
use super::drawer::Drawer;
use super::rank::Rank;
use super::share::share_out;
use crate::images::{Grid, ImageBatch};
use crate::model::Model;
use anyhow::Result;
use configs::RunConfig;
use configs::events::{Event, now};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Draws the same grid again and again as the weights change.
pub struct SampleGrid {
    model: Arc<dyn Model>,
    device: Device,
    drawer: Rc<Drawer>,
    num: usize,
    every_steps: u64,
}

impl SampleGrid {
    /// The grid that the config asks for; `None` when it asks for none.
    pub fn from_config(
        config: &RunConfig,
        drawer: Option<&Rc<Drawer>>,
        model: Arc<dyn Model>,
        device: Device,
    ) -> Option<Self> {
        let drawer = drawer.filter(|_| config.sample.every_steps > 0)?;
        let configs::SampleConfig { num, every_steps, .. } = config.sample;
        Some(Self { model, device, drawer: drawer.clone(), num, every_steps })
    }
}

impl BetweenSteps for SampleGrid {
    fn every_steps(&self) -> u64 {
        self.every_steps
    }

    /// Rank 0 keeps and shows the grid; nothing is measured.
    fn look(&self, rank: &mut Rank, step: u64) -> Result<BTreeMap<String, f64>> {
        let weights = rank.stepper.gather_ema()?;
        let batch = self.drawer.batch;
        let mut draw = |number: usize| {
            let range = number * batch..self.num.min((number + 1) * batch);
            // A picture that cannot be drawn must not end the run.
            self.drawer.draw(&weights, range.clone()).or_else(|error| {
                eprintln!("trainer: warning: sample grid of step {step}: {error}; gray images in its place");
                let shape = [&[range.len() as i64], self.model.latent_shape()].concat();
                self.drawer.decode(&Tensor::zeros(shape, (Kind::Float, self.device)))
            })
        };
        let mut all: Option<ImageBatch> = None;
        let mut take = |batch: ImageBatch| {
            match &mut all {
                None => all = Some(batch),
                Some(all) => all.append(batch)?,
            }
            Ok(())
        };
        share_out(&*rank.collective, self.num.div_ceil(batch), &mut draw, &mut take)?;
        let Some(images) = all else { return Ok(BTreeMap::new()) };
        let columns = (rank.recipe.model.num_classes as usize).clamp(1, 10);
        let grid = Grid::new(&images, columns, 2)?;
        if let Some(journal) = &mut rank.journal {
            let name = format!("samples/step-{step:09}.png");
            let path = journal.image(step, &name, "samples/ema", &grid.to_png()?, (grid.width, grid.height))?;
            rank.tell(|_| Event::Sample { step, path, time: now() })?;
        }
        Ok(BTreeMap::new())
    }
}
