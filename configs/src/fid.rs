//! `[fid]`: Fréchet distance and Inception Score of samples drawn during training.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;

use crate::validation::EMA_SECTION;

/// `[fid]`: samples are drawn with the settings of `[sample]` and compared with reference pictures.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FidConfig {
    /// Absolute path of the reference: an `.npz` of statistics or pictures, or a folder of pictures.
    pub reference: PathBuf,
    /// Absolute path of the Inception weights.
    pub inception: PathBuf,
    /// Steps between measurements, with one more at the last step; at least 1.
    pub every_steps: u64,
    /// Samples drawn for a measurement, at least 2.
    pub num: usize,
    /// Sections of a checkpoint, see [`crate::RunConfig::weight_sections`].
    pub weights: Vec<String>,
}

impl FidConfig {
    /// The defaults, for a reference and Inception weights.
    pub fn of(reference: PathBuf, inception: PathBuf) -> Self {
        Self { reference, inception, every_steps: 10_000, num: 10_000, weights: vec![EMA_SECTION.to_owned()] }
    }

    /// What is measured of every section's weights, as manifests and logs name it up to the slash.
    pub const METRICS: [&str; 2] = ["fid", "inception_score"];
}
