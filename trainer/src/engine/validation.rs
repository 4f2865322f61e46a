//! Held-out loss while training: all ranks together, between two steps.

use super::agree::agree;
use super::between::BetweenSteps;
use super::cache::open_options;
use super::rank::Rank;
use crate::model::Model;
use crate::recipe::Recipe;
use crate::validation::{HeldOut, HeldOutLoss};
use anyhow::{Context, Result};
use collective::Collective;
use configs::RunConfig;
use configs::events::{Event, now};
use configs::validation::loss_metric;
use std::collections::BTreeMap;
use std::sync::Arc;
use tch::Device;

/// Judges the weights that the config names, again and again as they change.
pub struct Validation {
    held_out: HeldOut,
    weights: Vec<String>,
    every_steps: u64,
}

impl Validation {
    /// The validation that the config asks for, on all ranks together; `None` when it asks for none.
    ///
    /// # Errors
    /// [`super::agree::Agreed`] when a rank cannot read the held-out data.
    pub fn from_config(
        config: &RunConfig,
        recipe: &Recipe,
        model: &Arc<dyn Model>,
        device: Device,
        collective: &dyn Collective,
    ) -> Result<Option<Self>> {
        let Some(validation) = config.validation.as_ref().filter(|validation| validation.every_steps > 0) else {
            return Ok(None);
        };
        let place = (collective.rank(), collective.world_size());
        let held_out = open_options(config, [validation.url.as_str()]).and_then(|options| {
            HeldOut::open(validation, &options, recipe, model.clone(), device, place).context("`validation.url`")
        });
        let held_out = agree(collective, held_out)?;
        if let Some(warning) = held_out.warning.as_ref().filter(|_| collective.rank() == 0) {
            eprintln!("trainer: warning: `validation.url`: {warning}");
        }
        let weights = validation.weights.clone();
        Ok(Some(Self { held_out, weights, every_steps: validation.every_steps }))
    }
}

impl BetweenSteps for Validation {
    fn every_steps(&self) -> u64 {
        self.every_steps
    }

    fn look(&self, rank: &mut Rank, step: u64) -> Result<BTreeMap<String, f64>> {
        let mut metrics = BTreeMap::new();
        for section in &self.weights {
            let weights = rank.stepper.gather_section(section)?;
            let judged = self.held_out.judge(&weights, &*rank.collective);
            let HeldOutLoss { loss, parts, bins } =
                judged.with_context(|| format!("step {step}, phase validation, weights `{section}`"))?;
            metrics.insert(loss_metric(section), loss);
            let weights = section.clone();
            rank.tell(|_| Event::Validation { step, weights, loss, parts, bins, time: now() })?;
        }
        Ok(metrics)
    }
}
