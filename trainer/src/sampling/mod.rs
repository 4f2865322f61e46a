//! From noise to latents: samplers, guidance, and generation with keyed noise.

mod generate;
mod guidance;
mod samplers;

pub use generate::{Generator, SamplerKind, SamplingOptions};
pub use guidance::{GuidedChannels, forward_with_cfg};
pub use samplers::{Ddim, Ddpm, LoopStep, Sampler, sample_loop};
