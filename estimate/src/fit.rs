//! What to change where a run does not fit.

use configs::{Precision, RunConfig, Sharding};
use serde::Serialize;

use crate::{Estimate, Machines, hardware::Hardware, model::Dims};

/// A change of the config, tried.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Change {
    /// Options of the launcher.
    pub set: Vec<String>,
    /// Whether every weight keeps its bits.
    pub same_bits: bool,
    /// What a rank then holds.
    pub peak_bytes: u64,
    /// What a step then takes.
    pub step_s: f64,
    /// Whether that is little enough.
    pub fits: bool,
}

/// Changes that lower the memory of a rank, those of the same bits first, each kind by how long a step takes with it; only what
/// lowers it is there.
pub fn changes(
    config: &RunConfig,
    dims: &Dims,
    machines: &Machines,
    hardware: &Hardware,
    before: &Estimate,
    budget_bytes: u64,
) -> Vec<Change> {
    let shardings = Sharding::ALL.into_iter().filter(|level| *level >= config.train.sharding);
    let recomputations = [0, 2, 1].into_iter().filter(|every| match config.train.activation_checkpointing {
        0 => true,
        now => *every > 0 && *every <= now,
    });
    let mut tried = Vec::new();
    let mut attempt = |changed: &RunConfig, same_bits: bool, set: Vec<String>| {
        let estimate = Estimate::new(changed, dims, machines, hardware);
        let peak_bytes = estimate.memory.peak_bytes;
        if peak_bytes < before.memory.peak_bytes {
            tried.push(Change {
                set,
                same_bits,
                peak_bytes,
                step_s: estimate.time.step_s,
                fits: peak_bytes <= budget_bytes,
            });
        }
    };
    let at = |sharding: Sharding, every: usize| {
        let mut changed = config.clone();
        let mut set = Vec::new();
        if sharding != config.train.sharding {
            changed.train.sharding = sharding;
            set.push(format!("train.sharding={}", u8::from(sharding)));
        }
        if every != config.train.activation_checkpointing {
            changed.train.activation_checkpointing = every;
            set.push(format!("train.activation_checkpointing={every}"));
        }
        (changed, set)
    };
    for (sharding, every) in shardings.flat_map(|level| recomputations.clone().map(move |every| (level, every))) {
        let (changed, set) = at(sharding, every);
        attempt(&changed, true, set);
    }
    // Other bits from here on: products in bfloat16, and lanes with fewer samples each, which deal rows in another order.
    for (base, set) in [(config.clone(), Vec::new()), at(Sharding::Weights, 1)] {
        if config.train.precision == Precision::Fp32 {
            let mut changed = base.clone();
            changed.train.precision = Precision::Bf16;
            attempt(&changed, false, [&set[..], &["train.precision=bf16".to_owned()]].concat());
        }
        let mut changed = base;
        while changed.train.micro_batch.is_multiple_of(2) && 2 * changed.train.lanes <= configs::lanes::MAX_LANES {
            changed.train.micro_batch /= 2;
            changed.train.lanes *= 2;
            let geometry = [("lanes", changed.train.lanes), ("micro_batch", changed.train.micro_batch)];
            let geometry = geometry.map(|(key, value)| format!("train.{key}={value}"));
            attempt(&changed, false, [&set[..], &geometry].concat());
        }
    }
    tried.sort_by(|a, b| b.same_bits.cmp(&a.same_bits).then(a.step_s.total_cmp(&b.step_s)));
    tried
}

/// The change to make first: of those that fit the quickest one that keeps the bits, else the quickest.
pub fn first(changes: &[Change]) -> Option<&Change> {
    changes.iter().find(|change| change.fits)
}
