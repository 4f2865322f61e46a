//! FID, sFID, Inception Score, precision and recall, as the evaluator of guided-diffusion (ADM) defines them.
//!
//! Pictures ([`ImageSet`]) go through the 2015 Inception-v3 ([`Inception`]) on all ranks ([`Extractor`]); rank 0 accumulates
//! [`Statistics`] in the order of the pictures and computes the [`Scores`].

mod blocks;
mod error;
mod extract;
mod gaussian;
mod images;
mod inception;
mod manifold;
mod npz;
#[cfg(test)]
mod npz_tests;
mod reference;
mod resize;
mod score;
mod scores;
mod statistics;
#[cfg(test)]
mod tests;
mod weights;

pub use error::MetricsError;
pub use extract::{Extractor, Pictures, Sink};
pub use gaussian::{Gaussian, Moments};
pub use images::{Fit, ImageReader, ImageSet};
pub use inception::{Features, Inception, POOL_FEATURES, SPATIAL_FEATURES};
pub use manifold::precision_recall;
pub use reference::Reference;
pub use resize::resize_bilinear_tf1;
pub use score::inception_score;
pub use scores::Scores;
pub use statistics::{Statistics, Wanted};
