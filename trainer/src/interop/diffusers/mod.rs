//! DiT to and from Hugging Face diffusers: `DiTTransformer2DModel` weights and `DiTPipeline` folders.
//!
//! Stock diffusers does not compute what the official DiT computes; docs/INTEROP.md tells where and what to do about it.

mod config;
mod error;
mod names;
mod read;
mod scheduler;
#[cfg(test)]
mod tests;
mod write;

pub use config::TransformerConfig;
pub use error::DiffusersError;
pub use names::{from_diffusers, to_diffusers};
pub use read::{is_folder, read};
pub use write::Pipeline;

/// The label that `DiTPipeline` takes for "no class", whatever the model.
const PIPELINE_NULL_LABEL: i64 = 1000;

/// The line that makes a loaded pipeline compute as the official DiT does (with `norm_eps` 1e-6, which is written).
pub const PATCH: &str =
    "for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0";

/// Rows of an exported label table: enough for the null label of `DiTPipeline` to be this model's.
pub fn label_rows(num_classes: i64) -> i64 {
    num_classes.max(PIPELINE_NULL_LABEL) + 1
}
