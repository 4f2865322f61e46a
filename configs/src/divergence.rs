//! `[divergence]`: what becomes of a step that diverges.

use serde::Serialize;

/// `[divergence]`: a step diverges when a loss or a gradient is not finite, or when the loss leaps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DivergenceConfig {
    /// What becomes of such a step.
    pub policy: OnDivergence,
    /// A loss above so many times the median of the last `window` ones has leapt; `None`: none has. Above 1.
    pub loss_spike: Option<f64>,
    /// Steps over which losses are compared and exceptions counted, 1 to 10000.
    pub window: usize,
    /// Most exceptions within `window` steps, at least 1; one more ends the run.
    pub budget: usize,
}

impl Default for DivergenceConfig {
    fn default() -> Self {
        Self { policy: OnDivergence::Stop, loss_spike: None, window: 100, budget: 3 }
    }
}

/// `divergence.policy`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnDivergence {
    /// The run ends; nothing of the step is kept.
    Stop,
    /// The step is made without an update.
    Skip,
    /// The run goes on from its newest checkpoint, and the lanes at fault are left out of the mean of that step.
    Rollback,
}
