//! All scores of a set of samples.

use super::inception::Inception;
use super::{MetricsError, Statistics, inception_score, precision_recall};
use serde::Serialize;

/// The field's scores. Where something is not known, its score is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Mean over splits of 5000 samples.
    pub inception_score: f64,
    /// Standard deviation over those splits.
    pub inception_score_std: f64,
    /// Fréchet distance of the pool features.
    pub fid: f64,
    /// Fréchet distance of the spatial features.
    pub sfid: Option<f64>,
    /// Share of samples that look real.
    pub precision: Option<f64>,
    /// Share of reference pictures that samples come close to.
    pub recall: Option<f64>,
}

impl Scores {
    /// The scores of samples whose statistics hold every sample's features.
    ///
    /// # Errors
    /// Too few pictures, or a refusal by libtorch.
    pub fn compute(inception: &Inception, samples: &Statistics, reference: &Statistics) -> Result<Self, MetricsError> {
        let (inception_score, inception_score_std) = inception_score(&inception.log_probabilities(&samples.features)?)?;
        let sfid = match (&reference.spatial, &samples.spatial) {
            (Some(reference), Some(samples)) => Some(samples.frechet_distance(reference, "sFID")?),
            _ => None,
        };
        let balls = match reference.features.size()[0] {
            0 => None,
            _ => {
                let [reference, samples] = [reference, samples].map(|of| of.features.to_device(inception.device()));
                Some(precision_recall(&reference, &samples)?)
            }
        };
        Ok(Self {
            inception_score,
            inception_score_std,
            fid: samples.pool.frechet_distance(&reference.pool, "FID")?,
            sfid,
            precision: balls.map(|(precision, _)| precision),
            recall: balls.map(|(_, recall)| recall),
        })
    }
}
