//! What is done to the numbers on their way.

use super::array::Array;
use crate::DataError;

/// What is done to the numbers on their way: first the channels are normalised, then all are divided.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Values {
    /// Mean and standard deviation of each channel: `(x − mean) / std`.
    pub normalize: Option<(Vec<f64>, Vec<f64>)>,
    /// A scaling factor to take out again.
    pub divide_by: Option<f64>,
}

impl Values {
    /// Refuses what cannot be done to such latents.
    ///
    /// # Errors
    /// With the reason.
    pub(super) fn check(&self, place: &str, moments: bool, shape: &[usize]) -> Result<(), DataError> {
        let refuse = |reason: String| Err(DataError::source(place, reason));
        if let Some(divisor) = self.divide_by
            && !(divisor.is_finite() && divisor > 0.0)
        {
            return refuse(format!("the numbers cannot be divided by {divisor}; expected a positive number"));
        }
        match &self.normalize {
            Some(_) if moments => refuse("stores posterior moments, which are not normalised".into()),
            Some((mean, std)) if mean.len() != shape[0] || std.len() != shape[0] => {
                refuse(format!("has {} channels, but there are statistics of {}", shape[0], mean.len()))
            }
            _ => Ok(()),
        }
    }

    /// Applies them to one sample; `moments` tells that every second latent is a log-variance.
    pub(super) fn apply(&self, latents: &mut [Array], moments: bool) {
        if let Some((mean, std)) = &self.normalize {
            for latent in latents.iter_mut() {
                let per_channel = latent.numbers.len() / latent.shape[0];
                for (channel, numbers) in latent.numbers.chunks_exact_mut(per_channel).enumerate() {
                    let (mean, std) = (mean[channel] as f32, std[channel] as f32);
                    numbers.iter_mut().for_each(|number| *number = (*number - mean) / std);
                }
            }
        }
        let Some(divisor) = self.divide_by else { return };
        for (column, latent) in latents.iter_mut().enumerate() {
            if moments && column % 2 == 1 {
                // The variance is divided by the square.
                let subtracted = (2.0 * divisor.ln()) as f32;
                latent.numbers.iter_mut().for_each(|number| *number -= subtracted);
            } else {
                let divisor = divisor as f32;
                latent.numbers.iter_mut().for_each(|number| *number /= divisor);
            }
        }
    }
}
