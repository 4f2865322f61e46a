//! What can go wrong between a VAE folder and a latent.

use std::path::PathBuf;

/// An AutoencoderKL that cannot be built or run.
#[derive(Debug, thiserror::Error)]
pub enum VaeError {
    /// A file of the folder cannot be read.
    #[error("{}: cannot read it: {reason}; expected a diffusers AutoencoderKL folder with config.json and diffusion_pytorch_model.safetensors", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: std::io::Error,
    },
    /// The config is not one that this implementation computes.
    #[error("{origin}: {reason}")]
    Config {
        /// The file, or what the config was taken from.
        origin: String,
        /// Key, found, expected.
        reason: String,
    },
    /// The weight file is not a complete safetensors file.
    #[error("{}: not a readable safetensors file ({reason}; {found_bytes} bytes found); copy or download it again", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        reason: String,
        /// How long the file is.
        found_bytes: usize,
    },
    /// The tensors are not those that the config describes.
    #[error("{origin}: {} tensors do not match the config:\n  {}", problems.len(), problems.join("\n  "))]
    Weights {
        /// The file, or what the tensors were taken from.
        origin: String,
        /// One line per missing, unexpected or wrong-shaped tensor.
        problems: Vec<String>,
    },
    /// A tensor handed to `encode` or `decode` has the wrong shape.
    #[error("vae {call}: found shape {found:?}, expected {expected}")]
    Input {
        /// `encode` or `decode`.
        call: &'static str,
        /// The shape given.
        found: Vec<i64>,
        /// The shape wanted.
        expected: String,
    },
    /// libtorch refused an operation.
    #[error(transparent)]
    Torch(#[from] tch::TchError),
}
