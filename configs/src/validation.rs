//! `[validation]`: held-out loss; and what a run measures of its weights, which the best checkpoints are chosen by.

use serde::{Deserialize, Serialize};

use crate::fid::FidConfig;
use crate::schema::{EmaConfig, RunConfig};

/// Section of a checkpoint that the weights themselves are in.
pub const MODEL_SECTION: &str = "model";
/// Section of the main moving average of the weights, which is looked at when nothing else is asked for.
pub const EMA_SECTION: &str = "ema";

/// `[validation]`: the loss on rows that are not trained on, with the same draws every time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ValidationConfig {
    /// Absolute URL of a parquet file or a folder of them, of the form of `data.url`. May hold credentials.
    pub url: String,
    /// Steps between validations, with one more at the last step; 0 = never (then only `trainer validate` uses the rest).
    pub every_steps: u64,
    /// Most rows that are judged, evenly spaced over the data set; all ranks together hold them in memory. At least 1.
    pub rows: usize,
    /// Draws of time and noise on every row, at least 1.
    pub draws: usize,
    /// Equal parts of the diffusion's time that are reported one by one and get equally many draws, 1 to 1000.
    pub bins: usize,
    /// Draws that are judged at once, at least 1.
    pub batch: usize,
    /// Sections of a checkpoint, see [`RunConfig::weight_sections`].
    pub weights: Vec<String>,
    /// Seed of times, noise and posterior samples.
    pub seed: u64,
}

impl ValidationConfig {
    /// The defaults, for a data set.
    pub fn of(url: String) -> Self {
        let weights = vec![EMA_SECTION.to_owned(), MODEL_SECTION.to_owned()];
        Self { url, every_steps: 1000, rows: 10_000, draws: 1, bins: 10, batch: 32, weights, seed: 0 }
    }
}

/// The metric of the held-out loss of a section's weights, as manifests and logs name it.
pub fn loss_metric(weights: &str) -> String {
    format!("val_loss/{weights}")
}

/// Whether a higher value of a metric is a better one; told by its name up to the slash.
pub fn higher_is_better(metric: &str) -> bool {
    matches!(metric.split('/').next(), Some("inception_score" | "precision" | "recall"))
}

impl EmaConfig {
    /// The sections of a checkpoint that hold the moving averages, the main one first: `ema`, `ema_0.999`,
    /// `ema_power_0.05`.
    pub fn sections(&self) -> Vec<String> {
        let further = self.further_decays.iter().map(|decay| format!("{EMA_SECTION}_{decay}"));
        let power = self.power.iter().map(|sigma_rel| format!("{EMA_SECTION}_power_{sigma_rel}"));
        std::iter::once(EMA_SECTION.to_owned()).chain(further).chain(power).collect()
    }
}

impl RunConfig {
    /// The sections of a checkpoint that a model can be run with: the moving averages, then the weights themselves.
    pub fn weight_sections(&self) -> Vec<String> {
        self.ema.sections().into_iter().chain([MODEL_SECTION.to_owned()]).collect()
    }

    /// The metrics that this run measures while it trains; those of a checkpoint's step are in its manifest.
    pub fn metrics(&self) -> Vec<String> {
        let validation = self.validation.as_ref().filter(|validation| validation.every_steps > 0);
        let losses =
            validation.into_iter().flat_map(|validation| validation.weights.iter().map(|name| loss_metric(name)));
        let fid = self.fid.iter().flat_map(|fid| FidConfig::METRICS.map(|metric| (fid, metric)));
        let scores = fid.flat_map(|(fid, metric)| fid.weights.iter().map(move |name| format!("{metric}/{name}")));
        losses.chain(scores).collect()
    }
}
