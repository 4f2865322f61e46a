//! Held-out loss: the training objective on rows that are not trained on, at fixed times with fixed noise.
//!
//! Labels are never dropped and latents never mirrored; where posteriors are stored, each row has one fixed sample.

mod draws;

pub use draws::{Draws, spread_rows};

use crate::diffusion::Objective;
use crate::model::{Model, WeightSet, no_probe};
use crate::recipe::{Recipe, RecipeError};
use collective::{Collective, CollectiveError};
use configs::ValidationConfig;
use configs::validation::higher_is_better;
use data_loader::{DataError, FixedOptions, FixedRows, LatentDataset, OpenOptions};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// This rank's part of the held-out rows, ready to judge weights.
pub struct HeldOut {
    model: Arc<dyn Model>,
    objective: Box<dyn Objective>,
    device: Device,
    draws: Draws,
    /// The time bin of every draw of all ranks.
    bins: Vec<usize>,
    bin_count: usize,
    batch: usize,
    /// This rank's draws.
    mine: Range<usize>,
    rows: FixedRows,
    /// What makes the losses doubtful, though they can be computed.
    pub warning: Option<String>,
}

/// The loss of one set of weights on all held-out rows.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldOutLoss {
    /// Mean of `bins`: the mean over uniformly distributed time.
    pub loss: f64,
    /// The same of its terms, before weighting.
    pub parts: BTreeMap<String, f64>,
    /// Mean loss in every time bin, from data to noise.
    pub bins: Vec<f64>,
}

/// Why weights cannot be validated.
#[derive(Debug, thiserror::Error)]
pub enum ValidationError {
    /// The data set cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The data set does not fit the model or the draws.
    #[error(transparent)]
    Recipe(#[from] RecipeError),
    /// The losses of a batch cannot be taken from the device.
    #[error("the losses of held-out rows cannot be computed: {0}")]
    Torch(#[from] tch::TchError),
    /// The other ranks' losses did not come.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// Ranks have judged other draws.
    #[error("the ranks sent {found} numbers about held-out rows; expected {expected}: they have opened different data")]
    Count {
        /// Numbers that came.
        found: usize,
        /// Numbers that all draws make.
        expected: usize,
    },
}

impl HeldOut {
    /// Opens the data set and reads the rows that `rank` of `world_size` ranks judges.
    ///
    /// # Errors
    /// A data set that cannot be read, does not fit the model, or has too few rows for the bins.
    pub fn open(
        config: &ValidationConfig,
        options: &OpenOptions,
        recipe: &Recipe,
        model: Arc<dyn Model>,
        device: Device,
        (rank, world_size): (usize, usize),
    ) -> Result<Self, ValidationError> {
        let dataset = LatentDataset::open_with(&config.url, options)?;
        let draws = Draws::new(dataset.meta().rows, config);
        let warning = check(&dataset, &draws, config.bins, recipe)?;
        let mine = share(draws.count(), config.batch, rank, world_size);
        let options = FixedOptions {
            seed: config.seed,
            scaling_factor: recipe.dataset.scaling_factor,
            num_classes: recipe.model.num_classes as usize,
        };
        let rows = dataset.fixed_rows(draws.rows(&mine), options)?;
        let (bins, bin_count, batch) = (draws.bins(), config.bins, config.batch);
        let objective = recipe.build_objective();
        Ok(Self { model, objective, device, draws, bins, bin_count, batch, mine, rows, warning })
    }

    /// Rows that all ranks judge together.
    pub fn row_count(&self) -> usize {
        self.draws.rows(&(0..self.draws.count())).len()
    }

    /// Judges `weights` on all rows, together with the other ranks. The result is the same on each of them, bit for bit,
    /// and for every number of ranks: batches are cut alike, and sums are made over all draws in their order.
    ///
    /// # Errors
    /// [`ValidationError::Torch`], [`ValidationError::Collective`], [`ValidationError::Count`].
    pub fn judge(&self, weights: &WeightSet, collective: &dyn Collective) -> Result<HeldOutLoss, ValidationError> {
        let mut names = String::new();
        let mut message = Vec::new();
        for first in self.mine.clone().step_by(self.batch) {
            let judged = self.judge_batch(weights, first..self.mine.end.min(first + self.batch));
            names = judged.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" ");
            let terms: Vec<&Tensor> = judged.iter().map(|(_, values)| values).collect();
            let values = Tensor::stack(&terms, 1).to_device(Device::Cpu).reshape([-1]);
            message.extend(Vec::<f64>::try_from(&values)?.into_iter().flat_map(f64::to_le_bytes));
        }
        // Rank 0 has a share however few draws there are.
        let names = collective.gather_bytes(names.as_bytes())?.swap_remove(0);
        let names = String::from_utf8_lossy(&names).into_owned();
        let all = collective.gather_bytes(&message)?.concat();
        let values: Vec<f64> = all.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect();
        self.combine(&names.split(' ').collect::<Vec<_>>(), &values)
    }

    /// The loss and its terms for every draw of a batch, `[N]` float64 each; the loss first.
    fn judge_batch(&self, weights: &WeightSet, batch: Range<usize>) -> Vec<(&'static str, Tensor)> {
        let _no_grad = tch::no_grad_guard();
        let latent = self.model.latent_shape();
        let numel = latent.iter().product::<i64>() as usize;
        let count = batch.len();
        let (mut x_start, mut noise) = (Vec::with_capacity(count * numel), vec![0f32; count * numel]);
        let (mut labels, mut times) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for (index, draw) in batch.enumerate() {
            let row = self.draws.row_index(draw, self.mine.start);
            x_start.extend_from_slice(&self.rows.x_start[row * numel..][..numel]);
            labels.push(self.rows.labels[row]);
            times.push(self.draws.time(draw, self.bins[draw]));
            self.draws.noise(draw, &mut noise[index * numel..][..numel]);
        }
        let shape = [&[count as i64], latent].concat();
        let to_device = |values: &[f32]| Tensor::from_slice(values).view(shape.as_slice()).to_device(self.device);
        let times = self.objective.times_at(&times);
        let noised = self.objective.noised(to_device(&x_start), times, to_device(&noise));
        let labels = Tensor::from_slice(&labels).to_device(self.device);
        let output = weights.forward(&*self.model, &noised.x_t, &noised.model_t, &labels, &mut no_probe);
        let losses = self.objective.losses(&output, &noised);
        let parts = losses.parts().map(|part| (part.name, part.values.to_kind(Kind::Double)));
        std::iter::once(("loss", losses.total().to_kind(Kind::Double))).chain(parts).collect()
    }

    /// The means of the terms `names` over all draws, given draw by draw.
    fn combine(&self, names: &[&str], values: &[f64]) -> Result<HeldOutLoss, ValidationError> {
        let expected = self.draws.count() * names.len();
        if values.len() != expected {
            return Err(ValidationError::Count { found: values.len(), expected });
        }
        let by_bin = |term: usize| {
            let mut sums = vec![(0.0, 0u32); self.bin_count];
            for (draw, &bin) in values.chunks(names.len()).zip(&self.bins) {
                let (sum, count) = &mut sums[bin];
                (*sum, *count) = (*sum + draw[term], *count + 1);
            }
            sums.into_iter().map(|(sum, count)| sum / f64::from(count)).collect::<Vec<f64>>()
        };
        let mean = |bins: &[f64]| bins.iter().sum::<f64>() / bins.len() as f64;
        let bins = by_bin(0);
        let part = |(term, name): (usize, &&str)| ((*name).to_owned(), mean(&by_bin(term)));
        Ok(HeldOutLoss { loss: mean(&bins), parts: names.iter().enumerate().skip(1).map(part).collect(), bins })
    }
}

/// The metric of a name, with the direction that the name tells.
pub fn metric(name: &str) -> checkpoint::Metric {
    checkpoint::Metric { name: name.to_owned(), higher_is_better: higher_is_better(name) }
}

/// The draws that a rank judges: whole batches, next to each other, so that it reads one stretch of the data set.
fn share(draws: usize, batch: usize, rank: usize, world_size: usize) -> Range<usize> {
    let per_rank = draws.div_ceil(batch).div_ceil(world_size) * batch;
    (rank * per_rank).min(draws)..((rank + 1) * per_rank).min(draws)
}

/// Compares the held-out data set with the one that is trained on; gives a warning where losses are doubtful.
fn check(dataset: &LatentDataset, draws: &Draws, bins: usize, recipe: &Recipe) -> Result<Option<String>, RecipeError> {
    let (meta, trained) = (dataset.meta(), &recipe.dataset);
    let mut problems = Vec::new();
    if meta.latent_shape != trained.latent_shape {
        problems.push(format!(
            "held-out latents have shape {:?}, the trained ones {:?}",
            meta.latent_shape, trained.latent_shape
        ));
    }
    if let Some(found) = meta.scaling_factor.filter(|found| *found != trained.scaling_factor) {
        problems
            .push(format!("held-out latents have scaling factor {found}, the trained ones {}", trained.scaling_factor));
    }
    if draws.count() < bins {
        let count = draws.count();
        problems.push(format!(
            "{} has rows for {count} draws only, fewer than the {bins} bins; lower `validation.bins`",
            dataset.name()
        ));
    }
    if !problems.is_empty() {
        return Err(RecipeError::Contradiction(problems));
    }
    Ok(match (&meta.vae_digest, &trained.vae_digest) {
        (Some(found), Some(expected)) if found != expected => Some(format!(
            "{} was encoded by a VAE with weights {found}, the data that are trained on by {expected}; losses compare only among themselves",
            dataset.name()
        )),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_whole_batches_in_order() {
        for (draws, batch) in [(100, 8), (7, 8), (64, 8), (9, 2)] {
            for world_size in [1, 2, 4, 8] {
                let shares: Vec<_> = (0..world_size).map(|rank| share(draws, batch, rank, world_size)).collect();
                assert!(
                    !shares[0].is_empty() && shares.iter().all(|share| share.is_empty() || share.start % batch == 0)
                );
                assert_eq!(shares.into_iter().flatten().collect::<Vec<_>>(), (0..draws).collect::<Vec<_>>());
            }
        }
    }
}
