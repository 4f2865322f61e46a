//! What a rank needs to make steps, and the parts of a step that are not the step itself.

use super::bucket::{Bucket, Buckets, slice, view_of};
use super::decisions::DecisionLog;
use super::optimizer::Optimizer;
use super::reducer::Reducer;
use super::tree::{LaneSum, sum_lanes};
use super::wire::{Summation, WireClock, WireTime};
use crate::diffusion::{LossTerms, Objective};
use crate::ffi::{TorchError, region, upload};
use crate::model::{Model, WeightSet};
use collective::{Collective, CollectiveError, Pending};
use configs::lanes::LaneBlock;
use configs::validation::MODEL_SECTION;
use data_loader::draws::{Key, Purpose};
use data_loader::{BrokenGroup, DataError, MicroBatch};
use rand_distr::{Bernoulli, Distribution};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// What defines the experiment for one rank.
#[derive(Clone, Copy, Debug)]
pub struct Experiment {
    /// The experiment's seed.
    pub seed: u64,
    /// Lanes of the experiment.
    pub lanes: usize,
    /// The lanes of this rank.
    pub block: LaneBlock,
    /// Where this rank computes.
    pub device: Device,
    /// How the ranks' sums of gradients become one.
    pub summation: Summation,
}

impl Experiment {
    /// A micro-batch as `model` takes it, on the device: the labels that this lane drops are null labels. A GPU may still
    /// read `batch` on return.
    ///
    /// # Shapes
    /// x_start [micro_batch, C, H, W], labels `[micro_batch]`.
    pub fn input(&self, model: &dyn Model, batch: &MicroBatch) -> (Tensor, Tensor) {
        let x_start = upload(&batch.x_start, model.latent_shape(), self.device);
        let mut labels = batch.labels.clone();
        if let (Some(null_label), Ok(dropout)) = (model.null_label(), Bernoulli::new(model.label_dropout())) {
            let mut rng = Key::new(self.seed, Purpose::LabelDrop, batch.step).lane(batch.lane).rng();
            for label in &mut labels {
                if dropout.sample(&mut rng) {
                    *label = null_label;
                }
            }
        }
        (x_start, Tensor::from_slice(&labels).to_device(self.device))
    }
}

/// Everything a rank needs to make steps.
pub struct Stepper {
    /// The denoiser.
    pub model: Arc<dyn Model>,
    /// What it is trained to do.
    pub objective: Box<dyn Objective>,
    /// Weights and what goes with them.
    pub buckets: Buckets,
    /// The update rule.
    pub optimizer: Optimizer,
    /// Exceptions that all ranks have agreed on.
    pub decisions: DecisionLog,
    pub(super) collective: Arc<dyn Collective>,
    pub(super) experiment: Experiment,
    pub(super) sums: Vec<LaneSum>,
    pub(super) reducer: Reducer,
    /// The weights of a bucket that are still coming back after an update.
    gathers: Vec<Option<Pending>>,
    pub(super) clock: WireClock,
}

/// What a step reports; the same on every rank but for the time waited.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// Mean loss over all lanes.
    pub loss: f64,
    /// Means of the loss's parts.
    pub parts: Vec<(&'static str, f64)>,
    /// Norm of the mean gradient, before it is clipped.
    pub grad_norm: f64,
    /// Learning rate that was used.
    pub lr: f64,
    /// Time this rank waited for data.
    pub data_wait: Duration,
    /// What this rank's gradients, and the weights that came back before it computed, took on the wire.
    pub wire: WireTime,
    /// The signal of every rank, see [`Stepper::step`].
    pub signals: Vec<u32>,
    /// The row groups whose rows were replaced at this step for the first time.
    pub replaced: Vec<BrokenGroup>,
}

/// Why a step was not made. Except in phase `update`, weights, moments and EMA are those of the step before.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StepError {
    #[error("rank {rank}, step {step}, phase data: {source}")]
    Data { rank: usize, step: u64, source: Box<DataError> },
    #[error("rank {rank}, step {step}, phase {phase}: {source}")]
    Torch { rank: usize, step: u64, phase: &'static str, source: TorchError },
    #[error("step {step}, phase {phase}: {source}")]
    Collective { step: u64, phase: &'static str, source: CollectiveError },
    #[error(
        "{who}step {step}: {what} is not finite; nothing was updated. Lower `optimizer.lr`, or look at the data of that lane \
         (`latents verify`); the run resumes from its last checkpoint"
    )]
    NonFinite { who: String, step: u64, what: String },
    #[error("step {step}, phase data: {source}; nothing was updated, and the run resumes from its last checkpoint")]
    TooMuchDamage { step: u64, source: Box<DataError> },
}

impl Stepper {
    /// A stepper over `buckets`, which belong to `model` and this rank's block of lanes.
    pub fn new(
        model: Arc<dyn Model>,
        objective: Box<dyn Objective>,
        buckets: Buckets,
        optimizer: Optimizer,
        collective: Arc<dyn Collective>,
        experiment: Experiment,
    ) -> Self {
        let Experiment { lanes, block, device, summation, .. } = experiment;
        let sum = |bucket: &Bucket| match summation {
            Summation::Tree => LaneSum::new(&bucket.layout, block.len, device),
            Summation::Backend(_) => LaneSum::running(&bucket.layout, block.len, device),
        };
        Self {
            sums: buckets.0.iter().map(sum).collect(),
            reducer: Reducer::new(&buckets.0, lanes, collective.world_size(), summation),
            gathers: buckets.0.iter().map(|_| None).collect(),
            clock: WireClock::default(),
            model,
            objective,
            buckets,
            optimizer,
            decisions: DecisionLog::default(),
            collective,
            experiment,
        }
    }

    /// Lets all ranks agree on losses, gradient norm and signals, and refuses a step that is not finite. The one wait
    /// for the device in a step: nothing may be updated before the norm is known to be finite.
    pub(super) fn agree(
        &self,
        step: u64,
        losses: &[LossTerms],
        grads: &[Tensor],
        data_wait: Duration,
        signal: u32,
    ) -> Result<StepReport, StepError> {
        let Experiment { lanes, block, .. } = self.experiment;
        let names: Vec<&'static str> =
            losses.first().map(|l| l.parts.iter().map(|p| p.0).collect()).unwrap_or_default();
        let terms = 1 + names.len();
        // One row of values a lane: the loss, its parts, and the squared norm of its finest shard of every bucket.
        let of_lane = |loss: &LossTerms| {
            let parts = loss.parts.iter().map(|(_, part)| part.to_kind(Kind::Double));
            std::iter::once(loss.total.detach().to_kind(Kind::Double)).chain(parts).collect::<Vec<_>>()
        };
        let mut values: Vec<Tensor> = losses.iter().flat_map(of_lane).collect();
        for (bucket, grad) in self.buckets.0.iter().zip(grads) {
            let finest = bucket.layout.finest_numel;
            let square = |i| slice(grad, &(i * finest..(i + 1) * finest)).square().sum(Kind::Double);
            values.extend((0..block.len).map(square));
        }
        let stacked = Tensor::stack(&values, 0).to_device(Device::Cpu);
        let mut message = Vec::<f64>::try_from(&stacked).map_err(|error| StepError::Torch {
            rank: self.collective.rank(),
            step,
            phase: "reduce",
            source: TorchError(error.to_string()),
        })?;
        message.push(f64::from(signal));
        let width = message.len();
        let all = self.wire(step, "reduce", self.collective.gather_values(message))?;

        let rank_of = |lane: usize| lane / block.len;
        let loss_of = |lane: usize, term: usize| all[rank_of(lane) * width + lane % block.len * terms + term];
        let square_of =
            |bucket: usize, lane: usize| all[rank_of(lane) * width + block.len * (terms + bucket) + lane % block.len];
        let over_lanes = |value: &dyn Fn(usize) -> f64| (0..lanes).map(value).collect::<Vec<f64>>();
        let mean = |term: usize| sum_lanes(&over_lanes(&|lane| loss_of(lane, term))) / lanes as f64;
        let bucket_squares = (0..grads.len()).map(|bucket| sum_lanes(&over_lanes(&|lane| square_of(bucket, lane))));
        let bucket_squares: Vec<f64> = bucket_squares.collect();

        let culprit = (0..lanes).find(|&lane| !loss_of(lane, 0).is_finite());
        if let Some(lane) = culprit {
            let what = format!("the loss of lane {lane} is {}, which", loss_of(lane, 0));
            return Err(StepError::NonFinite { who: format!("rank {}: ", rank_of(lane)), step, what });
        }
        if let Some(bucket) = bucket_squares.iter().position(|square| !square.is_finite()) {
            let name = &self.buckets.0[bucket].layout.entries[0].name;
            let what = format!("the gradient in the segment of `{name}`");
            return Err(StepError::NonFinite { who: String::new(), step, what });
        }
        Ok(StepReport {
            loss: mean(0),
            parts: names.into_iter().enumerate().map(|(i, name)| (name, mean(i + 1))).collect(),
            grad_norm: bucket_squares.iter().sum::<f64>().sqrt(),
            lr: self.optimizer.schedule.at(step),
            data_wait,
            wire: WireTime::default(),
            signals: all.chunks(width).map(|rank| rank[width - 1] as u32).collect(),
            replaced: Vec::new(),
        })
    }

    /// Lets all ranks record the broken row groups that any of them had to do with in this step, before what was computed
    /// from the rows in their places is used. Gives those that are new.
    pub(super) fn decide(&mut self, step: u64, found: &[BrokenGroup]) -> Result<Vec<BrokenGroup>, StepError> {
        let unreadable = |error: serde_json::Error| self.cannot("gather_bytes", error.to_string());
        let message = self.wire(step, "data", serde_json::to_vec(found).map_err(unreadable))?;
        let all = self.wire(step, "data", self.collective.gather_bytes(&message))?;
        let read = |message: &Vec<u8>| serde_json::from_slice::<Vec<BrokenGroup>>(message).map_err(unreadable);
        let all = self.wire(step, "data", all.iter().map(read).collect::<Result<Vec<_>, _>>())?;
        self.decisions
            .record(step, all.into_iter().flatten())
            .map_err(|source| StepError::TooMuchDamage { step, source: Box::new(source) })
    }

    /// Starts bringing every rank's updated shard of every bucket back to all ranks, in the order of the next forward.
    ///
    /// # Errors
    /// See [`Collective::start`].
    pub fn gather_weights(&mut self) -> Result<(), CollectiveError> {
        if self.collective.world_size() > 1 {
            for (bucket, gather) in self.buckets.0.iter().zip(&mut self.gathers) {
                *gather = Some(self.collective.all_gather(None, region(&bucket.params))?);
            }
        }
        Ok(())
    }

    /// Waits until the weights of bucket `index` are complete on this rank.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn wait_for_weights(&mut self, index: usize) -> Result<(), CollectiveError> {
        match self.gathers[index].take() {
            Some(gather) => self.clock.wait(gather, self.collective.deadline(), "gather", index),
            None => Ok(()),
        }
    }

    /// Waits until all weights are complete on this rank.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn wait_for_all_weights(&mut self) -> Result<(), CollectiveError> {
        (0..self.gathers.len()).try_for_each(|index| self.wait_for_weights(index))
    }

    /// The whole main EMA on every rank, as [`Stepper::gather_average`].
    ///
    /// # Errors
    /// What the collective reports.
    pub fn gather_ema(&self) -> Result<WeightSet, CollectiveError> {
        self.gather_average(0)
    }

    /// A whole moving average on every rank, for sampling; `index` counts the optimizer's averages. All ranks call it
    /// together.
    ///
    /// # Errors
    /// What the collective reports.
    pub fn gather_average(&self, index: usize) -> Result<WeightSet, CollectiveError> {
        self.weight_set(|bucket| {
            let whole = Tensor::zeros([bucket.layout.numel as i64], (Kind::Float, self.experiment.device));
            if self.collective.world_size() > 1 {
                let gather = self.collective.all_gather(Some(region(&bucket.averages[index])), region(&whole))?;
                gather.wait(self.collective.deadline())?;
            } else {
                whole.shallow_clone().copy_(&bucket.averages[index]);
            }
            Ok(whole)
        })
    }

    /// The weights that checkpoints hold in `section`, whole on every rank. All ranks call it together. Those of section
    /// `model` are views that the next update changes.
    ///
    /// # Errors
    /// What the collective reports; no such section.
    pub fn gather_section(&mut self, section: &str) -> Result<WeightSet, CollectiveError> {
        if section == MODEL_SECTION {
            self.wait_for_all_weights()?;
            return self.weight_set(|bucket| Ok(bucket.params.shallow_clone()));
        }
        match self.optimizer.averages.iter().position(|average| average.section == section) {
            Some(index) => self.gather_average(index),
            None => Err(self.cannot_gather(format!("there are no weights `{section}`"))),
        }
    }

    fn weight_set(
        &self,
        whole: impl Fn(&Bucket) -> Result<Tensor, CollectiveError>,
    ) -> Result<WeightSet, CollectiveError> {
        let mut named = HashMap::new();
        for bucket in &self.buckets.0 {
            let whole = whole(bucket)?;
            named.extend(bucket.layout.entries.iter().map(|entry| (entry.name.clone(), view_of(&whole, entry))));
        }
        WeightSet::from_named(&*self.model, named).map_err(|error| self.cannot_gather(error.to_string()))
    }

    fn cannot_gather(&self, reason: String) -> CollectiveError {
        self.cannot("all_gather", reason)
    }

    fn cannot(&self, op: &'static str, reason: String) -> CollectiveError {
        CollectiveError::Backend { rank: self.collective.rank(), op, reason }
    }

    pub(super) fn data<T>(&self, step: u64, result: Result<T, DataError>) -> Result<T, StepError> {
        result.map_err(|source| StepError::Data { rank: self.collective.rank(), step, source: Box::new(source) })
    }

    pub(super) fn wire<T>(
        &self,
        step: u64,
        phase: &'static str,
        result: Result<T, CollectiveError>,
    ) -> Result<T, StepError> {
        result.map_err(|source| StepError::Collective { step, phase, source })
    }

    pub(super) fn torch<T>(
        &self,
        step: u64,
        phase: &'static str,
        result: Result<T, TorchError>,
    ) -> Result<T, StepError> {
        result.map_err(|source| StepError::Torch { rank: self.collective.rank(), step, phase, source })
    }
}
