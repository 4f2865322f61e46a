//! One rank of a Diffusion Transformer training run.
//!
//! The way in is [`commands`]; the heart is [`engine::step`].

pub mod commands;
pub mod device;
pub mod diffusion;
pub mod ema;
pub mod encode;
pub mod engine;
pub mod ffi;
pub mod images;
pub mod interop;
pub mod metrics;
pub mod model;
pub mod recipe;
pub mod sampling;
pub mod telemetry;
pub mod vae;
pub mod validation;
