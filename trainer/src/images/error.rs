//! What can go wrong with picture files.

use std::path::{Path, PathBuf};

/// A picture that cannot be made, resized or written.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A file cannot be written.
    #[error("{}: cannot write it: {reason}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// A picture or batch has sizes that the call cannot take.
    #[error("{call}: {reason}")]
    Shape {
        /// The call.
        call: &'static str,
        /// What was found and what was expected.
        reason: String,
    },
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

impl ImageError {
    pub(super) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |reason| Self::Write { path: path.into(), reason }
    }
}
