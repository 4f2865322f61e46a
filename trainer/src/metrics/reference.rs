//! What samples are compared with.

use super::statistics::{Statistics, Wanted};
use super::{Extractor, Fit, ImageSet, MetricsError};
use std::path::Path;

/// A reference: statistics from a file, pictures, or both.
pub struct Reference {
    images: Option<ImageSet>,
    statistics: Option<Statistics>,
}

impl Reference {
    /// Opens an `.npz` of statistics ([`Statistics::read`]), of pictures, or of both, or any other set of pictures
    /// ([`ImageSet::open`]); `digest` is that of the Inception weights.
    ///
    /// # Errors
    /// None of these, or what is wrong with it.
    pub fn open(spec: &str, fit: Fit, digest: Option<&str>) -> Result<Self, MetricsError> {
        let path = Path::new(spec);
        let statistics = if path.is_file() { Statistics::read(path, digest)? } else { None };
        let images = match ImageSet::open(spec, fit) {
            Ok(images) => Some(images),
            // Statistics alone are enough.
            Err(_) if statistics.is_some() => None,
            Err(error) => return Err(error),
        };
        Ok(Self { images, statistics })
    }

    /// The pictures that have to go through the network for what is wanted.
    pub fn needed(&self, wanted: Wanted) -> Option<(&ImageSet, Wanted)> {
        let images = self.images.as_ref()?;
        match &self.statistics {
            None => Some((images, wanted)),
            Some(known) if wanted.features > 0 && known.features.size()[0] == 0 => {
                Some((images, Wanted { spatial: false, ..wanted }))
            }
            Some(_) => None,
        }
    }

    /// The statistics that the file has, the rest from the pictures. All ranks call it together, rank 0 gets the result.
    ///
    /// # Errors
    /// As [`Statistics::of_set`].
    pub fn statistics(
        self,
        wanted: Wanted,
        extractor: &Extractor,
        progress: &dyn Fn(usize),
    ) -> anyhow::Result<Option<Statistics>> {
        let found = match self.needed(wanted) {
            Some((images, wanted)) => Statistics::of_set(extractor, images, wanted, progress)?,
            None => None,
        };
        Ok(match (self.statistics.filter(|_| extractor.collects()), found) {
            (Some(known), Some(found)) => Some(Statistics { features: found.features, ..known }),
            (known, found) => known.or(found),
        })
    }
}
