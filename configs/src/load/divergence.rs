//! `[divergence]`

use std::ops::Bound::{Excluded, Unbounded};

use super::COUNT;
use crate::divergence::{DivergenceConfig, OnDivergence};
use crate::reader::Reader;

pub(super) fn read(r: &mut Reader) -> DivergenceConfig {
    let default = DivergenceConfig::default();
    DivergenceConfig {
        policy: r.choice(
            "divergence.policy",
            &[("stop", OnDivergence::Stop), ("skip", OnDivergence::Skip), ("rollback", OnDivergence::Rollback)],
            default.policy,
        ),
        loss_spike: r.optional_float("divergence.loss_spike", (Excluded(1.0), Unbounded)),
        window: r.integer("divergence.window", 1..=10_000, default.window as u64) as usize,
        budget: r.integer("divergence.budget", 1..=COUNT, default.budget as u64) as usize,
    }
}

/// Keys against each other.
pub(super) fn check(r: &mut Reader, divergence: &DivergenceConfig) {
    if divergence.policy != OnDivergence::Stop || !r.sound(&["divergence.policy"]) {
        return;
    }
    let advice = "set divergence.policy to \"skip\" or \"rollback\", or remove it";
    if r.given("divergence.budget") && r.sound(&["divergence.budget"]) {
        r.refuse("divergence.budget", "means nothing where the first divergence ends the run", advice);
    }
    let is_idle = divergence.loss_spike.is_none() && r.sound(&["divergence.loss_spike", "divergence.window"]);
    if r.given("divergence.window") && is_idle {
        let problem = "means nothing where the first divergence ends the run and no loss is compared with earlier ones";
        r.refuse("divergence.window", problem, advice);
    }
}
