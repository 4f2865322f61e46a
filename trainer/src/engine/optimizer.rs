//! AdamW and the exponential moving average, on this rank's shard of every bucket.

use super::bucket::{Bucket, slice};
use crate::ffi::{self, AdamW, AdamWSpan, TorchError};
use std::ops::Range;
use tch::Tensor;

/// The update rule; its state lies in the buckets.
pub struct Optimizer {
    /// AdamW with the base learning rate.
    pub hyper: AdamW,
    /// Decay of the weights' moving average.
    pub ema_decay: f64,
    /// Learning rate over time.
    pub schedule: LrSchedule,
}

/// Linear warm-up from 0, then constant or a decay to `final_lr` at `total_steps`.
#[derive(Clone, Copy, Debug)]
pub struct LrSchedule {
    /// After warm-up.
    pub lr: f64,
    /// At the end of a decay.
    pub final_lr: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
    /// Shape of the decay.
    pub decay: LrDecay,
}

/// How the learning rate falls after warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LrDecay {
    /// Not at all.
    Constant,
    /// Half a cosine.
    Cosine,
    /// A straight line.
    Linear,
}

impl LrSchedule {
    /// The learning rate of `step`, which counts from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.lr * step as f64 / self.warmup_steps as f64;
        }
        let rest = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / rest).min(1.0);
        let remaining = match self.decay {
            LrDecay::Constant => return self.lr,
            LrDecay::Linear => 1.0 - progress,
            LrDecay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        self.final_lr + (self.lr - self.final_lr) * remaining
    }
}

impl Optimizer {
    /// Updates weights, moments and EMA of this rank's shards. `grads` holds the mean gradient of each bucket's shard;
    /// `step` counts from 1. Every finest shard is updated on its own, so that the arithmetic is the same for every
    /// world size. The EMA runs over frozen parameters too, as the official code's does.
    ///
    /// # Errors
    /// What libtorch reports.
    ///
    /// # Source
    /// Loshchilov & Hutter 2019, algorithm 2; EMA: θ' ← θ' + (1 − decay)·(θ − θ').
    pub fn update(&self, buckets: &[Bucket], grads: &[Tensor], step: u64) -> Result<(), TorchError> {
        let mut spans = Vec::new();
        let (mut averages, mut weights) = (Vec::new(), Vec::new());
        for (bucket, grad) in buckets.iter().zip(grads) {
            let start = bucket.shard.start;
            let in_shard = |span: &Range<usize>| span.start - start..span.end - start;
            for span in bucket.layout.trainable_spans(bucket.shard.clone()) {
                spans.push(AdamWSpan {
                    param: slice(&bucket.params, &span),
                    grad: slice(grad, &in_shard(&span)),
                    exp_avg: slice(&bucket.exp_avg, &in_shard(&span)),
                    exp_avg_sq: slice(&bucket.exp_avg_sq, &in_shard(&span)),
                });
            }
            let finest = bucket.layout.finest_numel;
            for first in bucket.shard.clone().step_by(finest) {
                averages.push(slice(&bucket.ema, &in_shard(&(first..first + finest))));
                weights.push(slice(&bucket.params, &(first..first + finest)));
            }
        }
        let Some(first) = spans.first() else { return Ok(()) };
        let step_tensor = Tensor::from(step as f32).to_device(first.param.device());
        ffi::fused_adamw(&spans, &step_tensor, AdamW { lr: self.schedule.at(step), ..self.hyper })?;
        ffi::foreach_lerp(&averages, &weights, 1.0 - self.ema_decay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_learning_rate_warms_up_and_decays_to_its_end() {
        let schedule = |decay| LrSchedule { lr: 1.0, final_lr: 0.1, warmup_steps: 10, total_steps: 110, decay };
        assert_eq!(schedule(LrDecay::Cosine).at(5), 0.5);
        assert_eq!(schedule(LrDecay::Constant).at(10_000), 1.0);
        assert!((schedule(LrDecay::Linear).at(60) - 0.55).abs() < 1e-12);
        assert!((schedule(LrDecay::Cosine).at(60) - 0.55).abs() < 1e-12);
        assert!((schedule(LrDecay::Cosine).at(110) - 0.1).abs() < 1e-12);
        assert!((schedule(LrDecay::Linear).at(500) - 0.1).abs() < 1e-12);
    }
}
