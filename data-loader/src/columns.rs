//! The names of the columns that hold a sample.

/// Column names of a data set. The defaults are the names that [`crate::LatentWriter`] writes.
///
/// A file has either `latent`, or `latent_mean` and `latent_logvar` (which win if it has both).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Columns {
    /// The latent itself.
    pub latent: String,
    /// The mean of the VAE's posterior.
    pub latent_mean: String,
    /// The logarithm of the posterior's variance.
    pub latent_logvar: String,
    /// The latent of the mirrored image; with moments, the columns are this name with `_mean` and `_logvar` appended.
    pub latent_flipped: String,
    /// The class, an integer.
    pub label: String,
    /// The sample's name, text or integer; only `latents verify` reads it.
    pub id: String,
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            latent: "latent".into(),
            latent_mean: "latent_mean".into(),
            latent_logvar: "latent_logvar".into(),
            latent_flipped: "latent_flipped".into(),
            label: "label".into(),
            id: "id".into(),
        }
    }
}

impl Columns {
    pub(crate) fn flipped_mean(&self) -> String {
        format!("{}_mean", self.latent_flipped)
    }

    pub(crate) fn flipped_logvar(&self) -> String {
        format!("{}_logvar", self.latent_flipped)
    }
}
