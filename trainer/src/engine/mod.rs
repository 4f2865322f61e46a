//! The training engine of one rank: buckets, lanes, the step, and what surrounds it.

pub mod agree;
pub mod between;
pub mod bucket;
pub mod cache;
pub mod data;
pub mod decisions;
pub mod device;
pub mod divergence;
pub mod drawer;
pub mod due;
pub mod fid;
pub mod gradients;
pub mod grid;
pub mod groups;
pub mod initial;
pub mod mesh;
pub mod optimizer;
pub mod preflight;
pub mod rank;
pub mod ranks;
pub mod reducer;
pub mod requests;
pub mod run;
pub mod saver;
pub mod share;
pub mod snapshot;
pub mod start;
pub mod step;
pub mod stepper;
pub mod stop;
pub mod tape;
pub mod tree;
pub mod turns;
pub mod validation;
pub mod weights;
pub mod wire;

#[cfg(test)]
mod estimate_tests;
