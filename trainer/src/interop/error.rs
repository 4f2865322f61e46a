//! What can go wrong between a file of weights and a model.

use checkpoint::CheckpointError;
use std::path::{Path, PathBuf};

/// Weights that cannot be read or written. URLs in it carry no user-info and no query.
#[derive(Debug, thiserror::Error)]
pub enum InteropError {
    /// The file system refused something.
    #[error("{}: {action}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// "read", "write", "open".
        action: &'static str,
        /// Its reason.
        source: std::io::Error,
    },
    /// It is none of the things that can be read.
    #[error(
        "{location}: {found}; expected a run or checkpoint URL, a torch.save file, a safetensors file or a diffusers folder"
    )]
    NotRecognised {
        /// Redacted path or URL.
        location: String,
        /// What is there instead.
        found: String,
    },
    /// The file is of a known format but not as that format demands: cut short, damaged or made to harm.
    #[error("{}: not a sound {format} file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
        /// What was found where, and what was expected.
        reason: String,
    },
    /// Sound, but not something that this reader takes.
    #[error("{}: {what}; {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it has.
        what: String,
        /// What to do.
        remedy: String,
    },
    /// One tensor cannot be used.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name there.
        tensor: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The source has no such weights.
    #[error("{location}: there are no `{wanted}` weights; it has {}", if available.is_empty() { "none".to_owned() } else { available.join(", ") })]
    NoSection {
        /// Redacted path or URL.
        location: String,
        /// The section asked for.
        wanted: String,
        /// The sections that are there.
        available: Vec<String>,
    },
    /// The run folder has no such checkpoint.
    #[error("{url}: {reason}")]
    NoCheckpoint {
        /// Redacted URL.
        url: String,
        /// What was asked for and what there is.
        reason: String,
    },
    /// One of our checkpoints cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint's config cannot be read.
    #[error("{url}: {source}")]
    Recipe {
        /// Redacted URL.
        url: String,
        /// Why.
        source: Box<crate::recipe::RecipeError>,
    },
    /// A diffusers folder.
    #[error(transparent)]
    Diffusers(#[from] super::diffusers::DiffusersError),
    /// A checkpoint's adapters do not belong to its weights.
    #[error("{url}: {source}")]
    Adapters {
        /// Redacted URL.
        url: String,
        /// Why.
        source: crate::model::lora::LoraError,
    },
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}

impl InteropError {
    /// For `map_err` on file-system calls.
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, action, source }
    }
}
