//! Parquet latents to lanes to micro-batches, in plain host memory.
//!
//! [`LatentDataset`] reads the footers of parquet files anywhere `object_store` reaches and decodes chosen rows.
//! [`RowOrder`] is arithmetic: which rows lane `l` reads at step `s`, of one data set or of a mix. [`MicroBatchStream`] puts the
//! two together on a background thread. [`LatentDataset::fixed_rows`] reads chosen rows once, for validation. [`LatentWriter`] writes the files. [`draws`] holds the keyed random numbers that all of it, and the
//! trainer, uses.
//!
//! The calls block; make them outside of an async runtime.

mod access;
mod block;
mod bounds;
mod buckets;
mod captions;
pub mod convert;
mod damage;
mod dataset;
mod decode;
mod direct;
pub mod draws;
mod error;
mod features;
mod fixed;
mod footer;
mod form;
mod labels;
mod layout;
mod mix;
mod narrow;
mod order;
mod pages;
mod pattern;
#[cfg(test)]
mod properties;
mod read;
mod report;
mod schedule;
mod shapes;
mod source;
mod stream;
#[cfg(test)]
mod testing;
mod writer;

pub use access::OpenOptions;
pub use block::RowBlock;
pub use captions::{CaptionBatch, CaptionBlock, CaptionMeta, CaptionOptions};
pub use configs::{Columns, Flip};
pub use damage::{BrokenGroup, Damage, check_budget};
pub use dataset::{DatasetMeta, LatentDataset, RowGroup};
pub use error::DataError;
pub use fixed::{FixedOptions, FixedRows};
pub use form::Dtype;
pub use order::{MixedSource, RowOrder};
pub use report::{
    CaptionSummary, ChannelStats, ColumnLayout, CountRange, InspectOptions, Inspection, Layout, Preview, Problem,
    ReadSpeed, ShapeCount, Spread, Verification, VerifyOptions, inspect, inspect_with, preview, verify, verify_with,
};
pub use schedule::{EpochOrder, LaneSchedule, RowRun, ScheduleOptions};
pub use shapes::{RowShapes, Shapes};
pub use stores::BlockCache;
pub use stream::{
    HostAllocator, HostMemory, Latents, MicroBatch, MicroBatchStream, PlainMemory, StreamOptions, StreamSource,
};
pub use writer::{Caption, LatentRow, LatentWriter, Row, WriterOptions, WrittenPart};
