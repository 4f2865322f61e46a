//! Clipping, AdamW and the moving averages, on what this rank holds of every bucket.

use super::bucket::{Bucket, Entry, slice};
use super::groups::ParamGroups;
use crate::ema::Average;
use crate::ffi::{self, AdamW, AdamWSpan, TorchError};
use crate::model::Model;
use crate::model::patterns::PatternError;
use configs::{Decay, RunConfig};
use std::ops::Range;
use tch::Tensor;

/// Added to the gradient's norm before the limit is divided by it, as PyTorch's `clip_grad_norm_` does.
const CLIP_EPS: f64 = 1e-6;

/// The update rule; its state is `updates` and what lies in the buckets.
pub struct Optimizer {
    /// AdamW; learning rate and weight decay are set by schedule and groups.
    pub hyper: AdamW,
    /// Weight decay and learning-rate scale by parameter.
    pub groups: ParamGroups,
    /// A mean gradient with a larger norm is scaled down to this one.
    pub clip_grad_norm: Option<f64>,
    /// Learning rate over time.
    pub schedule: LrSchedule,
    /// What the buckets' averages are, in their order.
    pub averages: Vec<Average>,
    /// Updates made. AdamW's bias correction and the averages follow it, the learning rate follows the step.
    pub updates: u64,
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
    /// Before its first update, with every parameter in one group and no clipping.
    pub fn new(hyper: AdamW, schedule: LrSchedule, averages: Vec<Average>) -> Self {
        let groups = ParamGroups::uniform(hyper.weight_decay);
        Self { hyper, groups, clip_grad_norm: None, schedule, averages, updates: 0 }
    }

    /// What `[optimizer]` and `[ema]` ask for, before its first update.
    ///
    /// # Errors
    /// [`PatternError`]: a group that matches no parameter of `model`.
    pub fn of_config(config: &RunConfig, model: &dyn Model) -> Result<Self, PatternError> {
        let o = &config.optimizer;
        let schedule = LrSchedule {
            lr: o.lr,
            final_lr: o.final_lr,
            warmup_steps: o.warmup_steps,
            total_steps: config.train.steps,
            decay: match o.decay {
                Decay::Constant => LrDecay::Constant,
                Decay::Cosine => LrDecay::Cosine,
                Decay::Linear => LrDecay::Linear,
            },
        };
        let [beta1, beta2] = o.betas;
        let hyper = AdamW { lr: o.lr, beta1, beta2, eps: o.eps, weight_decay: o.weight_decay };
        Ok(Self {
            groups: ParamGroups::of_config(&o.groups, o.weight_decay, model)?,
            clip_grad_norm: o.clip_grad_norm,
            ..Self::new(hyper, schedule, Average::of_config(&config.ema))
        })
    }

    /// Updates weights, moments and averages of what this rank holds of one bucket, by the mean gradient of that. `step` counts from 1.
    /// Every span is updated on its own, so that the arithmetic is the same for every world size. The averages run over frozen
    /// parameters too, as the official code's does.
    ///
    /// # Errors
    /// What libtorch reports.
    ///
    /// # Source
    /// Loshchilov & Hutter 2019, algorithm 2; averages: θ' ← θ' + (1 − β)·(θ − θ').
    pub fn update_bucket(&self, bucket: &Bucket, grad: &Tensor, step: u64) -> Result<(), TorchError> {
        let update = self.updates + 1;
        let mut spans_by_group: Vec<Vec<AdamWSpan>> = self.groups.groups().iter().map(|_| Vec::new()).collect();
        let mut weights = Vec::new();
        let mut averages: Vec<Vec<Tensor>> = self.averages.iter().map(|_| Vec::new()).collect();
        let start = bucket.shard.start;
        let in_shard = |span: &Range<usize>| span.start - start..span.end - start;
        let group_of = |entry: &Entry| self.groups.of(&entry.name);
        for (group, span) in bucket.layout.trainable_spans(bucket.shard.clone(), group_of) {
            spans_by_group[group].push(AdamWSpan {
                param: slice(&bucket.held, &in_shard(&span)),
                grad: slice(grad, &in_shard(&span)),
                exp_avg: slice(&bucket.exp_avg, &in_shard(&span)),
                exp_avg_sq: slice(&bucket.exp_avg_sq, &in_shard(&span)),
            });
        }
        let finest = bucket.layout.finest_numel;
        for first in bucket.shard.clone().step_by(finest) {
            let span = first..first + finest;
            weights.push(slice(&bucket.held, &in_shard(&span)));
            for (slices, average) in averages.iter_mut().zip(&bucket.averages) {
                slices.push(slice(average, &in_shard(&span)));
            }
        }
        let lr = self.schedule.at(step);
        for (spans, group) in spans_by_group.iter().zip(self.groups.groups()) {
            let Some(first) = spans.first() else { continue };
            let update = Tensor::from(update as f32).to_device(first.param.device());
            let hyper = AdamW { lr: lr * group.lr_scale, weight_decay: group.weight_decay, ..self.hyper };
            ffi::fused_adamw(spans, &update, hyper)?;
        }
        for (average, slices) in self.averages.iter().zip(&averages) {
            ffi::foreach_lerp(slices, &weights, 1.0 - average.rule.decay_at(update))?;
        }
        Ok(())
    }

    /// Scales gradients down in place if their norm, over all buckets of all ranks, is above the limit. Elementwise, so that it does not
    /// matter where the shards are cut.
    pub fn clip(&self, grads: &[Tensor], grad_norm: f64) {
        let Some(limit) = self.clip_grad_norm else { return };
        let scale = limit / (grad_norm + CLIP_EPS);
        if scale < 1.0 {
            grads.iter().for_each(|grad| drop(grad.shallow_clone().g_mul_scalar_(scale)));
        }
    }

    /// Every bucket was updated.
    pub fn end_update(&mut self) {
        self.updates += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::bucket::Buckets;
    use crate::engine::mesh::Mesh;
    use crate::model::testing::tiny_dit;
    use configs::Sharding;
    use configs::lanes::allowed_world_sizes;
    use tch::{Device, Kind};

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

    /// Two groups with settings of their own, clipping, four averages.
    fn optimizer(model: &dyn Model) -> Optimizer {
        let group = |pattern: &str, weight_decay, lr_scale| configs::ParamGroup {
            patterns: vec![pattern.to_owned()],
            weight_decay: Some(weight_decay),
            lr_scale: Some(lr_scale),
        };
        let declared = [group("*.bias", 0.0, 1.0), group("blocks.0.*", 0.2, 0.5)];
        let ema = configs::EmaConfig { decay: 0.9, further_decays: vec![0.2], warmup: true, power: vec![0.1, 0.2] };
        let schedule = LrSchedule { lr: 1e-2, final_lr: 0.0, warmup_steps: 2, total_steps: 4, decay: LrDecay::Cosine };
        let hyper = AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
        Optimizer {
            groups: ParamGroups::of_config(&declared, 0.1, model).unwrap(),
            clip_grad_norm: Some(0.7),
            ..Optimizer::new(hyper, schedule, Average::of_config(&ema))
        }
    }

    /// Every tensor of the state after three updates, whole, bucket by bucket, made by ranks one after the other.
    fn state_after_three_updates(world_size: usize) -> Vec<Vec<Tensor>> {
        let (model, lanes) = (tiny_dit(), 4);
        let mut parts: Vec<Vec<Vec<Tensor>>> = Vec::new();
        for rank in 0..world_size {
            let mesh = Mesh::of(rank, world_size, lanes, Sharding::Optimizer, None).unwrap();
            let mut optimizer = optimizer(&model);
            let buckets = Buckets::initialise(&model, &mesh, 4, 1, &Default::default(), Device::Cpu).unwrap();
            for step in 1..=3 {
                let grad = |bucket: &Bucket| {
                    let whole = Tensor::arange(bucket.layout.numel as i64, (Kind::Float, Device::Cpu));
                    (slice(&whole, &bucket.shard) * step as f64).sin()
                };
                let grads: Vec<Tensor> = buckets.0.iter().map(grad).collect();
                optimizer.clip(&grads, 30.0);
                let mut parts = buckets.0.iter().zip(&grads);
                parts.try_for_each(|(bucket, grad)| optimizer.update_bucket(bucket, grad, step)).unwrap();
                optimizer.end_update();
            }
            assert_eq!(optimizer.updates, 3);
            let of_bucket = |bucket: &Bucket| {
                let moments =
                    [bucket.held.shallow_clone(), bucket.exp_avg.shallow_clone(), bucket.exp_avg_sq.shallow_clone()];
                moments.into_iter().chain(bucket.averages.iter().map(Tensor::shallow_clone)).collect()
            };
            parts.push(buckets.0.iter().map(of_bucket).collect());
        }
        let whole = |bucket: usize, tensor: usize| {
            Tensor::cat(&parts.iter().map(|rank| rank[bucket][tensor].shallow_clone()).collect::<Vec<_>>(), 0)
        };
        (0..parts[0].len()).map(|bucket| (0..7).map(|tensor| whole(bucket, tensor)).collect()).collect()
    }

    #[test]
    fn groups_clipping_and_averages_have_the_same_bits_on_every_number_of_ranks() {
        let alone = state_after_three_updates(1);
        for world_size in allowed_world_sizes(4).into_iter().skip(1) {
            let shared = state_after_three_updates(world_size);
            let same = alone.iter().flatten().zip(shared.iter().flatten()).all(|(a, b)| a.equal(b));
            assert!(same, "{world_size} ranks");
        }
        let [_, _, _, main, further, narrow, wide] = &alone[0][..] else { panic!("seven tensors") };
        assert!(![further, narrow, wide].into_iter().any(|other| other.equal(main)), "every average is its own");
    }
}
