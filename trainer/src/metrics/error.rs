//! What can go wrong between images and a score.

use std::path::{Path, PathBuf};

/// Images, weights or statistics that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// A file cannot be read or is not what its name says.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Found, expected, what to do.
        reason: String,
    },
    /// The tensors are not those of the 2015 Inception-v3.
    #[error(
        "{origin}: {} tensors are not those of the Inception-v3 of 2015-12-05 as pytorch-fid names them:\n  {}",
        problems.len(), problems.join("\n  ")
    )]
    Weights {
        /// The file, or what the tensors were taken from.
        origin: String,
        /// One line per missing, unexpected or wrong-shaped tensor.
        problems: Vec<String>,
    },
    /// The weight file cannot be read.
    #[error(transparent)]
    Read(#[from] Box<crate::interop::InteropError>),
    /// A score is not defined for these inputs.
    #[error("{metric}: {reason}")]
    Undefined {
        /// The score.
        metric: &'static str,
        /// Found and expected.
        reason: String,
    },
    /// An image of a source cannot be used.
    #[error(transparent)]
    Source(#[from] crate::encode::SourceError),
    /// A picture cannot be resized or written.
    #[error(transparent)]
    Image(#[from] crate::images::ImageError),
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

impl MetricsError {
    pub(super) fn file(path: &Path, reason: impl ToString) -> Self {
        Self::File { path: path.into(), reason: reason.to_string() }
    }
}
