//! What can go wrong between a diffusers folder and a model.

use std::path::PathBuf;

/// A diffusers folder that is no DiT, or a model that cannot become one.
#[derive(Debug, thiserror::Error)]
pub enum DiffusersError {
    /// Not a folder of a transformer or pipeline.
    #[error("{}: {reason}; expected a folder with config.json and diffusion_pytorch_model.safetensors, or a pipeline folder with model_index.json and transformer/", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is not there.
        reason: String,
    },
    /// A config that is not a DiT's.
    #[error("{origin}: {reason}")]
    Config {
        /// The file.
        origin: String,
        /// Key, found, expected.
        reason: String,
    },
    /// The tensors are not those that the config describes.
    #[error("{origin}: {} tensors do not match config.json:\n  {}", problems.len(), problems.join("\n  "))]
    Weights {
        /// File or folder.
        origin: String,
        /// One line per tensor.
        problems: Vec<String>,
    },
    /// The embedders of a block differ from those of block 0.
    #[error(
        "{origin}: `{name}` differs from the same tensor of transformer_blocks.0 by up to {difference:.1e}. A DiT has one timestep \
         embedder and one label table, diffusers a copy in each block, and training in diffusers moves the copies apart: such a \
         model (here block {block}) is no DiT any more. Weights trained with the embedders frozen can be read"
    )]
    UntiedCopies {
        /// File or folder.
        origin: String,
        /// The tensor.
        name: String,
        /// Its block.
        block: usize,
        /// Largest absolute difference.
        difference: f64,
    },
    /// A model that diffusers has no way to hold.
    #[error("diffusers cannot hold {what}: {why}")]
    NotRepresentable {
        /// What, with its value.
        what: String,
        /// Why not.
        why: String,
    },
    /// The VAE that should go along.
    #[error("the VAE of the pipeline: {0}")]
    Vae(String),
}
