//! The typed run config of Ditharos and the few facts that every other crate shares.
//!
//! A run is described by one TOML file. [`RunConfig::load`] reads it, applies `--set key=value` overrides, resolves
//! locations and presets, and either returns a config in which every value has been checked or one [`ConfigError`]
//! that lists *all* mistakes. This crate is the leaf of the workspace: it knows no tensors, no stores and no ranks.
//!
//! | module | what |
//! |---|---|
//! | [`schema`] | the config as types, one struct per section |
//! | [`presets`] | the twelve published DiT sizes |
//! | [`location`] | paths and URLs: resolving, redaction |
//! | [`lanes`] | which lanes a rank executes, which world sizes an experiment allows |
//! | [`resume`] | which keys differ between two configs in a way that makes another experiment |
//! | [`data`], [`diffusion`] | these two sections |
//! | [`sampler`] | the samplers by name |
//! | [`divergence`] | what becomes of a step that diverges |
//! | [`events`] | the JSON lines that a run writes |
//! | [`beat`] | the heartbeats of ranks |
//! | [`phases`] | what the step loop is at |
//! | [`spans`] | who was at what and when, for a trace |
//! | [`validation`] | held-out loss, and the metrics that checkpoints are chosen by |
//! | [`fid`] | Fréchet distance during training |
//! | [`cache`] | where bytes of remote data sets are kept |
//! | [`exit`] | the exit codes of the programs |

pub mod beat;
pub mod cache;
pub mod cluster;
mod columns;
pub mod data;
pub mod diffusion;
pub mod divergence;
pub mod error;
mod event_text;
pub mod events;
pub mod exit;
pub mod fid;
pub mod lanes;
mod load;
pub mod location;
mod overrides;
pub mod phases;
pub mod presets;
mod reader;
pub mod resume;
pub mod sampler;
pub mod schema;
pub mod spans;
mod urls;
pub mod validation;

pub use cache::CacheConfig;
pub use cluster::{Bind, ClusterConfig, KubernetesConfig, SlurmConfig, SlurmMpi};
pub use data::{Columns, DataConfig, DataSource, Flip, OnBroken};
pub use diffusion::{DiffusionConfig, Objective, Schedule, TimestepSampling};
pub use divergence::{DivergenceConfig, OnDivergence};
pub use error::{ConfigError, Mistake};
pub use fid::FidConfig;
pub use resume::{KeyChange, changed_experiment_keys};
pub use sampler::{GuidedChannels, Sampler};
pub use schema::*;
pub use urls::Urls;
pub use validation::ValidationConfig;
