//! Checkpoints of a training run in an object store: immutable shards, then one manifest whose presence is the commit.
//!
//! A run folder holds *attempts* (one record per start of the run), *shards* (safetensors files, one per rank, step and
//! attempt) and *manifests*. Every object is created once and never changed; nothing points at "the latest". What is
//! committed follows from the manifests that exist and from the attempts that were claimed, see [`RunStore::committed`].
//! `docs/CHECKPOINTS.md` gives the format to the byte.
//!
//! The crate works on host memory and knows no tensors beyond name, shape and element range. Its functions are
//! synchronous and may be called from any thread: inside is one small tokio runtime per process.
//!
//! ```
//! use checkpoint::{AttemptInfo, Commit, F32Bytes, RunStore, ShardId, Slice};
//! # fn main() -> Result<(), checkpoint::CheckpointError> {
//! let store = RunStore::open("memory:///example")?;
//! let attempt = store.claim_attempt(&AttemptInfo { resumed_from: None, world_size: 1, ..Default::default() })?;
//! let id = ShardId { attempt, step: 10, rank: 0, world_size: 1 };
//! let data = F32Bytes::from(&[1.0, 2.0, 3.0][..]);
//! let shard = store.write_shard(&id, &[Slice { name: "model/w", shape: &[3], start_numel: 0, data }])?;
//! store.commit(Commit { attempt, step: 10, optimizer_step: 10, shards: vec![shard], ..Commit::default() })?;
//! let (manifest, damaged) = store.newest_valid()?.expect("one was committed");
//! assert!(damaged.is_empty());
//! assert_eq!(store.read(&manifest).read_f32("model/w", 1..3)?, [2.0, 3.0]);
//! # Ok(()) }
//! ```

mod attempt;
mod backend;
mod chunk;
mod commit;
pub mod digest;
mod error;
mod garbage;
mod keys;
mod load;
mod local;
mod location;
mod manifest;
mod metric;
mod probe;
mod reader;
mod request;
mod resume;
mod retention;
mod runtime;
mod sealed;
mod shard;
mod store;
mod values;

pub use attempt::{AttemptInfo, AttemptRecord};
pub use chunk::{CHUNK_BYTES, ChunkDigests, Digest};
pub use commit::Commit;
pub use error::CheckpointError;
pub use garbage::{Activity, Garbage};
pub use load::Target;
pub use manifest::{Dtype, Manifest, ObjectRecord, SliceEntry, TensorEntry};
pub use metric::Metric;
pub use reader::{CheckpointReader, ReadInto};
pub use resume::{Committed, Damaged};
pub use retention::Retention;
pub use shard::{PartRecord, ShardId, ShardRecord, Slice, SliceRecord};
pub use store::{RunStore, StoreOptions};
pub use stores::SafetensorsHeader;
pub use values::F32Bytes;
