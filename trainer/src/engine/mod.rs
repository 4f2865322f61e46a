//! The training engine of one rank: buckets, lanes, the step, and what surrounds it.

pub mod agree;
pub mod between;
pub mod bucket;
pub mod cache;
pub mod data;
pub mod drawer;
pub mod due;
pub mod fid;
pub mod grid;
pub mod groups;
pub mod initial;
pub mod optimizer;
pub mod rank;
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
pub mod validation;
