//! What is in a data set (`latents inspect`), what it looks like, and whether it can be trusted (`latents verify`).

mod captions;
mod in_order;
mod inspect;
mod layout;
mod preview;
mod sample;
mod verify;

pub use captions::{CaptionSummary, CountRange};
pub use inspect::{ChannelStats, InspectOptions, Inspection, ShapeCount, inspect, inspect_with};
pub use layout::{ColumnLayout, Layout, Spread};
pub use preview::{Preview, preview};
pub use sample::ReadSpeed;
pub use verify::{Problem, Verification, VerifyOptions, verify, verify_with};

/// Told how many rows are done; called by the calling thread alone.
pub type Progress<'a> = &'a mut dyn FnMut(u64);

#[cfg(test)]
mod tests;
