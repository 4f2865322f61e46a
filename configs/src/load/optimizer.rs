//! `[optimizer]` and `[ema]`.

use std::ops::Bound::{Excluded, Included};

use super::{ANY, BELOW_ONE, POSITIVE};
use crate::reader::Reader;
use crate::schema::*;

/// Largest relative width of a power-function average: above 12^-1/2 it would weigh early weights more than late ones.
const MAX_SIGMA_REL: f64 = 0.28;

pub(super) fn read(r: &mut Reader) -> OptimizerConfig {
    OptimizerConfig {
        lr: r.float("optimizer.lr", POSITIVE, 1e-4),
        betas: r.float_pair("optimizer.betas", BELOW_ONE, [0.9, 0.999]),
        eps: r.float("optimizer.eps", POSITIVE, 1e-8),
        weight_decay: r.float("optimizer.weight_decay", 0.0.., 0.0),
        warmup_steps: r.integer("optimizer.warmup_steps", 0..=ANY, 0),
        decay: r.choice(
            "optimizer.decay",
            &[("constant", Decay::Constant), ("cosine", Decay::Cosine), ("linear", Decay::Linear)],
            Decay::Constant,
        ),
        final_lr: r.float("optimizer.final_lr", 0.0.., 0.0),
        clip_grad_norm: r.optional_float("optimizer.clip_grad_norm", POSITIVE),
        groups: r.tables("optimizer.groups", |r| {
            r.require("match", "name the parameters, such as match = [\"*.bias\"]");
            let patterns = r.text_list("match");
            if patterns.is_empty() && r.given("match") && r.sound(&["match"]) {
                r.refuse("match", "is empty", "name the parameters, or remove the group");
            }
            ParamGroup {
                patterns,
                weight_decay: r.optional_float("weight_decay", 0.0..),
                lr_scale: r.optional_float("lr_scale", 0.0..),
            }
        }),
    }
}

pub(super) fn read_ema(r: &mut Reader) -> EmaConfig {
    EmaConfig {
        decay: r.float("ema.decay", BELOW_ONE, 0.9999),
        further_decays: r.distinct_floats("ema.further_decays", BELOW_ONE),
        warmup: r.boolean("ema.warmup", false),
        power: r.distinct_floats("ema.power", (Excluded(0.0), Included(MAX_SIGMA_REL))),
    }
}

/// Keys against each other.
pub(super) fn check(r: &mut Reader, c: &RunConfig) {
    if c.optimizer.decay != Decay::Constant
        && r.sound(&["optimizer.warmup_steps", "train.steps"])
        && c.optimizer.warmup_steps >= c.train.steps
    {
        let steps = c.train.steps;
        r.refuse(
            "optimizer.warmup_steps",
            format!("leaves no step for the decay, because train.steps = {steps}"),
            format!("use at most {}", steps - 1),
        );
    }
    if r.sound(&["ema.decay", "ema.further_decays"]) && c.ema.further_decays.contains(&c.ema.decay) {
        let decay = c.ema.decay;
        r.refuse("ema.further_decays", format!("repeats ema.decay = {decay}"), "leave it out of one of them");
    }
}
