//! What a rank needs to make steps, and the parts of a step that are not the step itself.

use super::bucket::{Bucket, Buckets, slice, view_of};
use super::decisions::DecisionLog;
use super::divergence::{Diverged, Guard, Observed};
use super::gradients::{self, GradientSum};
use super::mesh::Mesh;
use super::optimizer::Optimizer;
use super::ranks::Ranks;
use super::tree::sum_lanes;
use super::turns::Turns;
use super::weights::{self, WeightSource, WeightsError};
use super::wire::{Summation, WireTime};
use crate::diffusion::{LossTerms, Objective};
use crate::ffi::{TorchError, region, upload};
use crate::model::{Model, WeightSet};
use collective::{Collective, CollectiveError};
use configs::OnDivergence;
use configs::lanes::LaneError;
use configs::phases::Phase;
use configs::spans::phase;
use configs::validation::MODEL_SECTION;
use data_loader::draws::{Key, Purpose};
use data_loader::{BrokenGroup, DataError, MicroBatch};
use rand_distr::{Bernoulli, Distribution};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tch::{Device, Kind, Tensor};

/// Of buckets of so many elements those whose update need not wait for the end of the backward pass: with a third of all elements. A step
/// sends as much for gradients, behind the backward pass, as for weights, behind the next forward pass, which takes half as long. With a
/// third of the weights behind the backward pass the wire has in each as much to do as it takes, all along the chain. Not the very first
/// of them: it would come when the backward pass is over, and go before what is needed first.
fn going_ahead(numels: &[usize]) -> Vec<bool> {
    let (mut ahead, mut passed, mut gone) = (vec![false; numels.len()], 0, 0);
    for (index, numel) in numels.iter().enumerate().skip(AHEAD_LAG + 1).rev() {
        passed += numel;
        // To the nearest whole bucket.
        ahead[index] = 2 * passed >= 3 * (2 * gone + numel);
        gone += if ahead[index] { *numel } else { 0 };
    }
    ahead
}

/// Such an update comes so many segments after the bucket's own: its sum has had time to arrive.
const AHEAD_LAG: usize = 3;

/// What defines the experiment for one rank.
#[derive(Clone, Copy, Debug)]
pub struct Experiment {
    /// The experiment's seed.
    pub seed: u64,
    /// This rank's lanes and what it holds.
    pub mesh: Mesh,
    /// Where this rank computes.
    pub device: Device,
    /// How the ranks' sums of gradients become one.
    pub summation: Summation,
    /// See [`Turns::new`].
    pub recompute_every: usize,
}

impl Experiment {
    /// That of a lone rank.
    ///
    /// # Errors
    /// `lanes` is not a power of two.
    pub fn alone(seed: u64, lanes: usize, device: Device) -> Result<Self, LaneError> {
        Ok(Self { seed, mesh: Mesh::alone(lanes)?, device, summation: Summation::Tree, recompute_every: 0 })
    }

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
    /// Judges every step before its update.
    pub guard: Guard,
    pub(super) collective: Arc<dyn Collective>,
    pub(super) experiment: Experiment,
    pub(super) gradients: Box<dyn GradientSum>,
    pub(super) weights: Box<dyn WeightSource>,
    pub(super) turns: Arc<Turns>,
    going_ahead: Vec<bool>,
    pub(super) ranks: Arc<Ranks>,
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
    /// How the step has diverged, if it has and was made without an update for that.
    pub diverged: Option<Box<Diverged>>,
}

/// Why a step was not made. A part of weights, moments and EMA may be updated by then: this rank's state is that of no step.
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
        "{0}. Lower `optimizer.lr`, look at the data of that lane (`latents verify`), or let `divergence.policy` pass such steps over; \
         the run resumes from its last checkpoint"
    )]
    Diverged(Box<Diverged>),
    #[error(
        "step {step}, phase data: {source}; nothing of the step is kept, and the run resumes from its last checkpoint"
    )]
    TooMuchDamage { step: u64, source: Box<DataError> },
}

impl Stepper {
    /// A stepper over `buckets`, which belong to `model` and this rank's place. All ranks call it together.
    ///
    /// # Errors
    /// See [`Ranks::connect`].
    pub fn new(
        model: Arc<dyn Model>,
        objective: Box<dyn Objective>,
        buckets: Buckets,
        optimizer: Optimizer,
        collective: Arc<dyn Collective>,
        experiment: Experiment,
    ) -> Result<Self, CollectiveError> {
        let turns = Arc::new(Turns::new(&*model, experiment.recompute_every));
        let ranks = Arc::new(Ranks::connect(collective.clone(), experiment.mesh, experiment.summation)?);
        Ok(Self {
            gradients: gradients::sum(ranks.clone(), &buckets.0),
            going_ahead: going_ahead(&buckets.0.iter().map(|bucket| bucket.layout.numel).collect::<Vec<_>>()),
            weights: weights::source(ranks.clone(), &turns),
            turns,
            model,
            objective,
            buckets,
            optimizer,
            decisions: DecisionLog::default(),
            guard: Guard::default(),
            collective,
            experiment,
            ranks,
        })
    }

    /// Waits for the mean gradients of what this rank holds; with each bucket's goes, as scalars on the device, the squared norms of the
    /// finest shards that this rank answers for.
    pub(super) fn mean_gradients(&mut self, step: u64) -> Result<(Vec<Tensor>, Vec<Vec<Tensor>>), StepError> {
        let (lanes, buckets) = (self.lanes_left(step), &self.buckets.0);
        let mut squares: Vec<Vec<Tensor>> = buckets.iter().map(|_| Vec::new()).collect();
        let mut square = |index: usize, own: &Tensor| {
            let finest = buckets[index].layout.finest_numel;
            let of_shard = |start| slice(own, &(start..start + finest)).square().sum(Kind::Double);
            squares[index] = (0..own.numel()).step_by(finest).map(of_shard).collect();
        };
        let grads = self.gradients.finish(lanes, &mut square);
        Ok((self.wire(step, "reduce", grads)?, squares))
    }

    /// Lets all ranks agree on losses, gradient norm and signals, and on what becomes of a step that diverges. The one wait
    /// for the device in a step: what waits for all gradients is updated after it.
    pub(super) fn agree(
        &mut self,
        step: u64,
        losses: &[LossTerms],
        squares: Vec<Vec<Tensor>>,
        data_wait: Duration,
        signal: u32,
    ) -> Result<StepReport, StepError> {
        let mesh = self.experiment.mesh;
        let (lanes, per_rank) = (mesh.lanes, mesh.lanes_per_rank());
        let names: Vec<&'static str> =
            losses.first().map(|l| l.parts.iter().map(|p| p.0).collect()).unwrap_or_default();
        let terms = 1 + names.len();
        // Of each lane that this rank has run the loss and its parts; of each bucket the squared norms.
        let of_lane = |loss: &LossTerms| {
            let parts = loss.parts.iter().map(|(_, part)| part.to_kind(Kind::Double));
            std::iter::once(loss.total.detach().to_kind(Kind::Double)).chain(parts).collect::<Vec<_>>()
        };
        let mut values: Vec<Tensor> = losses.iter().flat_map(of_lane).collect();
        values.extend(squares.into_iter().flatten());
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

        let loss_of = |lane: usize, term: usize| {
            let (rank, index) = mesh.place_of_lane(lane);
            all[rank * width + index * terms + term]
        };
        let square_of = |bucket: usize, finest: usize| {
            let (rank, index) = mesh.owner(finest);
            all[rank * width + per_rank * (terms + bucket) + index]
        };
        // There are as many lanes as finest shards.
        let of_all = |value: &dyn Fn(usize) -> f64| (0..lanes).map(value).collect::<Vec<f64>>();
        let counts: Vec<bool> = (0..lanes).map(|lane| self.decisions.counts(step, lane).0).collect();
        let counted = |lane: usize, term: usize| if counts[lane] { loss_of(lane, term) } else { 0.0 };
        let mean = |term: usize| sum_lanes(&of_all(&|lane| counted(lane, term))) / self.lanes_left(step) as f64;
        let bucket_squares =
            (0..self.buckets.0.len()).map(|bucket| sum_lanes(&of_all(&|finest| square_of(bucket, finest))));
        let bucket_squares: Vec<f64> = bucket_squares.collect();
        let mut report = StepReport {
            loss: mean(0),
            parts: names.into_iter().enumerate().map(|(i, name)| (name, mean(i + 1))).collect(),
            grad_norm: bucket_squares.iter().sum::<f64>().sqrt(),
            lr: self.optimizer.schedule.at(step),
            data_wait,
            wire: WireTime::default(),
            signals: all.chunks(width).map(|rank| rank[width - 1] as u32).collect(),
            replaced: Vec::new(),
            diverged: None,
        };
        if self.decisions.skips(step) {
            return Ok(report);
        }
        let losses: Vec<Option<f64>> = (0..lanes).map(|lane| counts[lane].then(|| loss_of(lane, 0))).collect();
        let broken = bucket_squares.iter().position(|square| !square.is_finite());
        let broken_gradient = broken.map(|bucket| self.buckets.0[bucket].layout.entries[0].name.as_str());
        let observed = Observed { step, losses: &losses, loss: report.loss, broken_gradient };
        match self.guard.judge(&observed, &mut self.decisions) {
            None => self.guard.made(report.loss),
            Some(diverged) => {
                let diverged = Box::new(self.with_places(step, diverged)?);
                if diverged.action != OnDivergence::Skip {
                    return Err(StepError::Diverged(diverged));
                }
                report.diverged = Some(diverged);
            }
        }
        Ok(report)
    }

    /// Whether some buckets ([`going_ahead`]) are updated, and their weights travel, while the backward pass of the last lane still computes.
    /// Not where an update may have to wait for all gradients (for their norm, or to be left out), nor where ranks do not each
    /// update a part of weights that all of them keep.
    pub(super) fn updates_ahead(&self, step: u64) -> bool {
        let mesh = self.experiment.mesh;
        let shares = mesh.shards > 1 && mesh.held() == mesh.own() && !mesh.shares_out_weights();
        let waits = self.optimizer.clip_grad_norm.is_some() || self.guard.may_skip() || self.decisions.skips(step);
        shares && !waits
    }

    /// Segment `index` has run backwards: updates the bucket whose turn it is, if it is one that goes ahead.
    pub(super) fn update_ahead(&mut self, step: u64, index: usize) -> Result<(), StepError> {
        let index = index + AHEAD_LAG;
        if self.going_ahead.get(index) != Some(&true) {
            return Ok(());
        }
        let mean = self.gradients.mean(index, self.lanes_left(step));
        let mean = self.wire(step, "reduce", mean)?;
        self.update(step, index, &mean)
    }

    /// Updates all buckets but those that have gone ahead if any were to.
    pub(super) fn update_all(&mut self, step: u64, grads: &[Tensor], ahead: bool) -> Result<(), StepError> {
        for (index, grad) in grads.iter().enumerate() {
            if !(ahead && self.going_ahead[index]) {
                self.update(step, index, grad)?;
            }
        }
        Ok(())
    }

    /// Updates bucket `index` and sends its weights on their way.
    fn update(&mut self, step: u64, index: usize, grad: &Tensor) -> Result<(), StepError> {
        let _updating = phase(Phase::Update, "update", index as u64);
        let updated = self.optimizer.update_bucket(&self.buckets.0[index], grad, step);
        self.torch(step, "update", updated)?;
        let published = self.weights.publish(&self.buckets.0, index);
        self.weights_of(step, "update", published)
    }

    /// Lanes that count in the mean of `step`.
    pub(super) fn lanes_left(&self, step: u64) -> usize {
        (0..self.experiment.mesh.lanes).filter(|lane| self.decisions.counts(step, *lane).0).count()
    }

    /// Says which ranks have run the lanes at fault, and where. All ranks call it together.
    fn with_places(&self, step: u64, mut diverged: Diverged) -> Result<Diverged, StepError> {
        let hosts =
            self.wire(step, diverged.phase, self.collective.gather_bytes(collective::host_name().as_bytes()))?;
        for lane in &mut diverged.lanes {
            lane.rank = self.experiment.mesh.place_of_lane(lane.lane).0;
            lane.host = String::from_utf8_lossy(&hosts[lane.rank]).into_owned();
        }
        Ok(diverged)
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

    /// Says that every rank has its part of the weights, from a checkpoint or an update, see [`WeightSource::publish`].
    ///
    /// # Errors
    /// What the collective or libtorch reports.
    pub fn publish_weights(&mut self) -> Result<(), WeightsError> {
        (0..self.buckets.0.len()).try_for_each(|index| self.weights.publish(&self.buckets.0, index))
    }

    /// Waits until nothing is on its way to this rank any more.
    ///
    /// # Errors
    /// See [`collective::Pending::wait`].
    pub fn settle_weights(&mut self) -> Result<(), CollectiveError> {
        self.weights.settle(&self.buckets.0)
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
        self.weight_set(|bucket| self.gathered(bucket, &bucket.averages[index]))
    }

    /// The whole of what this rank holds a part of, as a copy.
    fn gathered(&self, bucket: &Bucket, held: &Tensor) -> Result<Tensor, CollectiveError> {
        let whole = Tensor::zeros([bucket.layout.numel as i64], (Kind::Float, self.experiment.device));
        slice(&whole, &bucket.shard).copy_(held);
        let (mesh, deadline) = (self.experiment.mesh, self.collective.deadline());
        if mesh.over_all {
            let part = slice(&whole, &bucket.layout.shard(mesh.part()));
            self.ranks.peers().all_gather(None, region(&part))?.wait(deadline)?;
        }
        if mesh.shards > 1 {
            self.ranks.group().all_gather(None, region(&whole))?.wait(deadline)?;
        }
        Ok(whole)
    }

    /// The weights that checkpoints hold in `section`, whole on every rank. All ranks call it together. Those of section
    /// `model` may be views that the next update changes.
    ///
    /// # Errors
    /// What the collective reports; no such section.
    pub fn gather_section(&mut self, section: &str) -> Result<WeightSet, CollectiveError> {
        if section == MODEL_SECTION {
            self.settle_weights()?;
            return self.weight_set(|bucket| match self.experiment.mesh.shares_out_weights() {
                true => self.gathered(bucket, &bucket.held),
                false => Ok(bucket.params.shallow_clone()),
            });
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

    pub(super) fn weights_of<T>(
        &self,
        step: u64,
        phase: &'static str,
        result: Result<T, WeightsError>,
    ) -> Result<T, StepError> {
        result.map_err(|error| match error {
            WeightsError::Collective(source) => StepError::Collective { step, phase, source },
            WeightsError::Torch(source) => StepError::Torch { rank: self.collective.rank(), step, phase, source },
        })
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
