//! The training loop: resume, step, log, sample, checkpoint, stop.

use super::divergence::Diverged;
use super::due::Due;
use super::rank::Rank;
use super::saver::{Save, Saved};
use super::start::Initialised;
use super::stepper::{StepError, StepReport};
use super::wire::WireTime;
use crate::model::Model;
use crate::telemetry::{Trace, measured_gemm_rate};
use anyhow::Result;
use configs::events::{Event, now};
use configs::location::redact;
use configs::phases::{self, Phase};
use configs::spans::phase;
use configs::{OnDivergence, WhenBusy};
use data_loader::BrokenGroup;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The last step was reached and is committed.
    Done,
    /// All ranks stopped on request after the same step, which is committed; the run can be resumed.
    Stopped,
    /// All ranks have agreed to go on from the newest checkpoint, with the decisions that they have now.
    RolledBack,
}

/// Trains until the last step or a stop request. All ranks call it together. A `trace` is written and taken when it is complete.
///
/// # Errors
/// What ended the run early; everything committed stays valid.
pub fn run(rank: &mut Rank, trace: &mut Option<Trace>) -> Result<Outcome> {
    let steps = rank.config.train.steps;
    let mut meter = Meter::start(rank);
    rank.tell(|rank| Event::Start {
        attempt: rank.attempt,
        resumed_from: rank.resumed_from,
        world_size: rank.collective.world_size(),
        lanes: rank.config.train.lanes,
        steps,
        params: rank.stepper.model.numel() as u64,
        trainable: trainable(&*rank.stepper.model),
        time: now(),
    })?;
    if let Some(Initialised { from, changes }) = rank.initialised.take() {
        rank.tell(|_| Event::Init { from, changes, time: now() })?;
    }
    let is_due = |step: u64, every: u64| every > 0 && (step.is_multiple_of(every) || step == steps);
    let done = rank.resumed_from.unwrap_or(0);
    phases::enter(Phase::Between);
    if std::mem::take(&mut rank.put_off) {
        rank.look(done, &|every| is_due(done, every))?;
    }
    for step in done + 1..=steps {
        let signal = rank.timetable.signal(&rank.stop) | rank.saver.signal();
        let report = match rank.stepper.step(step, &mut rank.batches, signal) {
            Err(StepError::Diverged(diverged)) => return rank.fall_back(*diverged),
            other => other?,
        };
        if let Some(diverged) = &report.diverged {
            rank.tell(|_| diverged.event())?;
        }
        rank.pass_over(step, &report.replaced)?;
        let save = rank.timetable.due(step, &report.signals);
        let stop = save == Some(Due::Stop);
        let due = |every: u64| is_due(step, every);

        meter.count(&report);
        if due(rank.config.log.every_steps) || stop {
            meter.report(rank, step, &report)?;
        }
        let saved = rank.saver.advance(&report.signals)?;
        rank.announce(saved)?;
        // Who has asked for a stop waits for nothing but the checkpoint; the rest is put off until the run goes on.
        rank.put_off = stop && rank.between.iter().any(|task| due(task.every_steps()));
        let metrics = if stop { BTreeMap::new() } else { rank.look(step, &due)? };
        if let Some(why) = save {
            rank.save(step, why, metrics)?;
        }
        if let Some(trace) = trace.take_if(|trace| stop || trace.is_complete(step)) {
            trace.write(&*rank.collective)?;
        }
        if stop {
            rank.finish_saving()?;
            rank.tell(|_| Event::Stop { step, reason: "asked to stop".to_owned(), time: now() })?;
            // An engine ends all ranks as soon as one has exited with 75: nobody leaves before everything is said.
            rank.collective.barrier()?;
            return Ok(Outcome::Stopped);
        }
    }
    rank.stepper.settle_weights()?;
    rank.finish_saving()?;
    if let Some(trace) = trace.take() {
        trace.write(&*rank.collective)?;
    }
    rank.tell(|_| Event::Done { step: steps, time: now() })?;
    rank.collective.barrier()?;
    Ok(Outcome::Done)
}

impl Rank {
    /// Tells the journal of an event; ranks other than 0 have none.
    pub(super) fn tell(&mut self, event: impl FnOnce(&Rank) -> Event) -> Result<()> {
        if self.journal.is_none() {
            return Ok(());
        }
        let event = event(self);
        if let Some(journal) = &mut self.journal {
            journal.event(&event)?;
            if !matches!(event, Event::Step { .. }) {
                journal.sync();
            }
        }
        Ok(())
    }

    /// Does what is due between this step and the next; gives what was measured of the weights.
    fn look(&mut self, step: u64, due: &dyn Fn(u64) -> bool) -> Result<BTreeMap<String, f64>> {
        let _looking = phase(Phase::Evaluate, "look", step);
        let mut metrics = BTreeMap::new();
        let between = std::mem::take(&mut self.between);
        for task in between.iter().filter(|task| due(task.every_steps())) {
            metrics.extend(task.look(self, step)?);
        }
        self.between = between;
        Ok(metrics)
    }

    /// Begins a checkpoint, unless it may be skipped and the one before is still on its way.
    fn save(&mut self, step: u64, why: Due, metrics: BTreeMap<String, f64>) -> Result<()> {
        if why == Due::Stop {
            self.stop.raise();
        }
        let busy = self.saver.under_way().filter(|_| self.config.checkpoint.when_busy == WhenBusy::Skip);
        if let (Due::Regular, Some(under_way)) = (why, busy) {
            self.timetable.restart(false);
            return self.tell(|_| Event::CheckpointSkipped { step, under_way, time: now() });
        }
        self.stepper.settle_weights()?;
        let requests = self.timetable.restart(true);
        let (stepper, record, put_off) = (&self.stepper, &self.record, self.put_off);
        let save = Save { step, stepper, metrics, put_off, record, requests };
        let saved = self.saver.save(save)?;
        self.announce(saved)
    }

    /// Leaves a step that was not made, for the newest checkpoint or for good.
    fn fall_back(&mut self, diverged: Diverged) -> Result<Outcome> {
        self.tell(|_| diverged.event())?;
        if diverged.action != OnDivergence::Rollback {
            return Err(StepError::Diverged(Box::new(diverged)).into());
        }
        // What is on its way is the newest.
        let saved = self.saver.finish()?;
        self.announce(saved)?;
        Ok(Outcome::RolledBack)
    }

    /// Waits for the last checkpoint. A stop request has its answer then, whatever else takes time.
    fn finish_saving(&mut self) -> Result<()> {
        let saved = self.saver.finish()?;
        self.grace = None;
        self.announce(saved)
    }

    /// Says which row groups were replaced for the first time. A rank that has taken one for sound, whose copy of the files
    /// is another, reads again what it has read ahead.
    fn pass_over(&mut self, step: u64, replaced: &[BrokenGroup]) -> Result<()> {
        for group in replaced {
            let BrokenGroup { source, file, row_group, rows, reason, .. } = group.clone();
            self.tell(|_| Event::Replaced { step, source, file, row_group, rows, reason, time: now() })?;
        }
        if let Some(damage) = self.damage.as_ref().filter(|damage| !damage.adopt(replaced.iter().cloned())) {
            let damage = Some(damage.clone());
            self.batches = self.data.open_stream(&self.config, damage, step)?;
        }
        Ok(())
    }

    fn announce(&mut self, saved: Option<Saved>) -> Result<()> {
        let Some(Saved { step, key }) = saved else { return Ok(()) };
        self.tell(|rank| {
            let url = format!("{}/{key}", redact(&rank.config.run.url).trim_end_matches('/'));
            Event::Checkpoint { step, url, time: now() }
        })
    }
}

fn trainable(model: &dyn Model) -> u64 {
    model.named_params().iter().filter(|(_, spec)| spec.trainable).map(|(_, spec)| spec.numel() as u64).sum()
}

/// Rates between two log lines.
struct Meter {
    since: Instant,
    steps: u64,
    data_wait: Duration,
    wire: WireTime,
    /// FLOP/s of a plain matrix product here, which MFU is a share of; 0 where nobody asks.
    gemm_rate: f64,
}

impl Meter {
    fn start(rank: &Rank) -> Self {
        let gemm_rate = if rank.journal.is_some() { measured_gemm_rate(rank.device) } else { 0.0 };
        Self { since: Instant::now(), steps: 0, data_wait: Duration::ZERO, wire: WireTime::default(), gemm_rate }
    }

    fn count(&mut self, report: &StepReport) {
        self.steps += 1;
        self.data_wait += report.data_wait;
        self.wire += report.wire;
    }

    fn report(&mut self, rank: &mut Rank, step: u64, report: &StepReport) -> Result<()> {
        let elapsed = self.since.elapsed().as_secs_f64().max(1e-9);
        let images_per_s = (self.steps * rank.config.global_batch() as u64) as f64 / elapsed;
        // Forward and backward cost three forward passes; a multiply-add is two operations.
        let flop_per_s = images_per_s * 6.0 * rank.stepper.model.macs_per_sample() as f64;
        let peak = self.gemm_rate * rank.collective.world_size() as f64;
        let part = |name: &str| report.parts.iter().find(|part| part.0 == name).map(|part| part.1);
        let (steps, gemm_rate) = (rank.config.train.steps, self.gemm_rate);
        let (made, data_wait, overlap) = (self.steps, self.data_wait.as_secs_f64(), self.wire.overlap());
        rank.tell(|rank| Event::Step {
            step,
            steps,
            epoch: step / rank.data.order.steps_per_epoch(),
            loss: report.loss,
            mse: part("mse").unwrap_or(report.loss),
            vb: part("vb"),
            lr: report.lr,
            grad_norm: report.grad_norm,
            images_per_s,
            data_wait_share: data_wait / elapsed,
            overlap,
            eta_s: (steps - step) as f64 * elapsed / made as f64,
            rows_read: if rank.data.order.sources() > 1 { rank.data.order.rows_read(step) } else { Vec::new() },
            mfu: (peak > 0.0).then(|| flop_per_s / peak),
            time: now(),
        })?;
        *self =
            Self { since: Instant::now(), steps: 0, data_wait: Duration::ZERO, wire: WireTime::default(), gemm_rate };
        Ok(())
    }
}
