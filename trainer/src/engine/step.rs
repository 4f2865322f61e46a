//! One optimizer update: batch, objective, segments, reduction, update.

use super::divergence::Counts;
use super::stepper::{StepError, StepReport, Stepper};
use super::tape::{Backward, Tape};
use super::turns::Turn;
use crate::ffi;
use crate::model::Flow;
use configs::phases::{self, Phase};
use configs::spans::{Track::Compute, phase, span};
use data_loader::{DataError, MicroBatch, MicroBatchStream};
use std::time::{Duration, Instant};

/// Where a rank's micro-batches come from.
pub trait Batches {
    /// The next one, in the order (step, lane).
    ///
    /// # Errors
    /// As [`MicroBatchStream::next`].
    fn next(&mut self) -> Result<MicroBatch, DataError>;

    /// Takes the memory of one back; no device reads it any more.
    fn recycle(&mut self, batch: MicroBatch);
}

impl Batches for MicroBatchStream {
    fn next(&mut self) -> Result<MicroBatch, DataError> {
        MicroBatchStream::next(self)
    }

    fn recycle(&mut self, batch: MicroBatch) {
        MicroBatchStream::recycle(self, batch);
    }
}

impl<F: FnMut() -> Result<MicroBatch, DataError>> Batches for F {
    fn next(&mut self) -> Result<MicroBatch, DataError> {
        self()
    }

    fn recycle(&mut self, _: MicroBatch) {}
}

/// Bit of a rank's step signal: rows of a broken row group were replaced that no log has yet.
const REPLACED: u32 = 128;

impl Stepper {
    /// Makes step `step` (which counts from 1) over this rank's lanes, one after the other. Every rank learns every
    /// rank's `signal`, so that all of them act on it after the same step.
    ///
    /// # Errors
    /// [`StepError`]; the state is that of no step then.
    pub fn step(&mut self, step: u64, batches: &mut dyn Batches, signal: u32) -> Result<StepReport, StepError> {
        phases::begin_step(step);
        let _step = phase(Phase::Forward, "step", step);
        let mut data_wait = Duration::ZERO;
        let mut losses = Vec::with_capacity(self.experiment.mesh.lanes_per_rank());
        let mut used = Vec::with_capacity(self.experiment.mesh.lanes_per_rank());
        let ahead = self.updates_ahead(step);
        for (number, lane) in self.experiment.mesh.lanes_of_rank().enumerate() {
            let asked = Instant::now();
            let batch = {
                let _waiting = phase(Phase::Data, "wait for data", lane as u64);
                self.data(step, batches.next())?
            };
            data_wait += asked.elapsed();

            let (x_start, labels) = self.experiment.input(&*self.model, &batch);
            let noised = self.objective.noise(x_start, self.experiment.seed, batch.step, lane);
            let tape = self.forward(step, self.model.input(&noised.x_t, &noised.model_t, &labels))?;

            let output = tape.output();
            let loss = self.objective.loss(&output, &noised);
            let output_grad = self.torch(step, "loss", ffi::grad_of_scalar(&loss.total, &output))?;
            let ahead = ahead && number + 1 == self.experiment.mesh.lanes_per_rank();
            self.backward(step, tape.into_backward(output_grad), self.decisions.counts(step, lane), ahead)?;
            losses.push(loss);
            used.push(batch);
        }
        phases::enter(Phase::Reduce);
        let (grads, squares) = self.mean_gradients(step)?;
        let broken: Vec<_> = used.iter().flat_map(|batch| batch.broken.iter().cloned()).collect();
        let found = self.decisions.unknown(&broken);
        let signal = signal | if found.is_empty() { 0 } else { REPLACED };
        let mut report = {
            let _agreeing = span(Compute, "agree", None);
            self.agree(step, &losses, squares, data_wait, signal)?
        };
        report.wire = self.ranks.wire_time();
        if report.signals.iter().any(|signal| signal & REPLACED != 0) {
            report.replaced = self.decide(step, &found)?;
        }
        // `agree` has waited for the device.
        used.into_iter().for_each(|batch| batches.recycle(batch));
        if self.decisions.skips(step) {
            return Ok(report);
        }
        self.optimizer.clip(&grads, report.grad_norm);
        self.update_all(step, &grads, ahead)?;
        self.optimizer.end_update();
        Ok(report)
    }

    /// Runs the chain; each segment waits for its weights.
    fn forward(&mut self, step: u64, input: Flow) -> Result<Tape, StepError> {
        let _forward = span(Compute, "forward", None);
        let mut tape = Tape::new(input);
        for index in 0..self.buckets.0.len() {
            let whole = self.weights.acquire(&self.buckets.0, index);
            self.weights_of(step, "forward", whole)?;
            let _segment = span(Compute, "forward of segment", index as u64);
            tape.forward(&*self.model.segments()[index], &self.buckets.0[index].weights, self.turns.keeps[index]);
            let released = self.weights.release(&self.buckets.0, index);
            self.weights_of(step, "forward", released)?;
        }
        Ok(tape)
    }

    /// Runs the chain backwards; gradients travel while the next segment computes, and so do new weights if any are to go `ahead`.
    fn backward(&mut self, step: u64, mut pass: Backward, counts: Counts, ahead: bool) -> Result<(), StepError> {
        let _backward = phase(Phase::Backward, "backward", None);
        let turns = self.turns.clone();
        for turn in &turns.backward {
            let index = turn.segment();
            let whole = self.weights.acquire(&self.buckets.0, index);
            self.weights_of(step, "backward", whole)?;
            let _segment = span(Compute, "backward of segment", index as u64);
            let (segment, bucket) = (&*self.model.segments()[index], &self.buckets.0[index]);
            let grads = match turn {
                Turn::Again(_) => {
                    pass.again(index, segment, &bucket.weights);
                    None
                }
                Turn::Backward(_) => Some(pass.segment(segment, &bucket.weights, &bucket.trainable)),
            };
            let released = self.weights.release(&self.buckets.0, index);
            self.weights_of(step, "backward", released)?;
            let Some(grads) = grads else { continue };
            let grads = counts.weigh(self.torch(step, "backward", grads)?);
            let pushed = self.gradients.push(&self.buckets.0[index], index, grads);
            self.wire(step, "reduce", pushed)?;
            if ahead {
                self.update_ahead(step, index)?;
            }
        }
        Ok(())
    }
}
