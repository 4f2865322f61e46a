//! The commit: one create-only manifest, after everything that it names is there.

use crate::{
    attempt::check_fence,
    backend::Landed,
    chunk::CHUNK_BYTES,
    error::CheckpointError,
    manifest::{FORMAT, Manifest, ObjectRecord, SliceEntry, TensorEntry, read_manifest},
    runtime,
    sealed::{seal, unix_ms},
    shard::ShardRecord,
    store::RunStore,
};
use futures::{StreamExt, TryStreamExt};
use serde_json::Value;
use std::collections::{BTreeMap, btree_map::Entry};

/// Shards looked up at a time.
const LOOKUPS: usize = 16;

/// A checkpoint to be committed.
#[derive(Debug, Clone, Default)]
pub struct Commit {
    /// The attempt that was claimed.
    pub attempt: u32,
    /// Training step.
    pub step: u64,
    /// Optimizer updates done.
    pub optimizer_step: u64,
    /// The run's config. No secrets.
    pub config: Value,
    /// The agreed exceptions so far.
    pub decision_log: Value,
    /// As [`Manifest::recent_losses`]; finite.
    pub recent_losses: Vec<f64>,
    /// What was measured of these weights, by name; finite numbers.
    pub metrics: BTreeMap<String, f64>,
    /// As [`Manifest::put_off`].
    pub put_off: bool,
    /// One per rank of the world that wrote, in any order.
    pub shards: Vec<ShardRecord>,
}

impl RunStore {
    /// Commits a checkpoint whose shards are all written, by one rank. Committing the same content again succeeds and returns
    /// the manifest that is there.
    ///
    /// # Errors
    /// [`CheckpointError::Incomplete`] if a tensor is not covered exactly once, a rank's shard is lacking, an object is not in
    /// the store with its length, or a metric is not finite; [`CheckpointError::Fenced`] if a later attempt took over or the step
    /// was committed with other content; store errors, after which the commit may or may not have happened: call again to find out.
    pub fn commit(&self, commit: Commit) -> Result<Manifest, CheckpointError> {
        let (attempt, step) = (commit.attempt, commit.step);
        let backend = &self.backend;
        let incomplete = |reason: String| CheckpointError::Incomplete { url: backend.url.clone(), step, reason };
        let mut manifest = assemble(commit).map_err(incomplete)?;
        manifest.check().map_err(incomplete)?;
        let (limit, key) = (backend.options.upload_timeout, manifest.key());
        let work = async move {
            manifest.resumed_from = self.own_attempt(attempt).await?.resumed_from;
            check_fence(backend, attempt, step).await?;
            let shards = &manifest.shards;
            futures::stream::iter(0..shards.len())
                .map(|index| async move {
                    let shard = &shards[index];
                    let found = backend.size_bytes(&shard.key).await?;
                    let wrong = || {
                        incomplete(format!("`{}` has {found} bytes in the store; expected {}", shard.key, shard.bytes))
                    };
                    (found == shard.bytes).then_some(()).ok_or_else(wrong)
                })
                .buffered(LOOKUPS)
                .try_collect::<()>()
                .await?;
            let bytes = seal(&manifest).map_err(incomplete)?;
            if backend.create_small(&manifest.key(), &bytes).await? == Landed::Ours {
                return Ok(manifest);
            }
            // An earlier call of this process may have committed and not known it; only the time differs then.
            let found = read_manifest(backend, step, attempt).await?;
            manifest.created_unix_ms = found.created_unix_ms;
            if found == manifest {
                return Ok(found);
            }
            Err(CheckpointError::Fenced {
                url: backend.url.clone(),
                attempt,
                key: manifest.key(),
                reason: "the step is committed with other content".to_owned(),
            })
        };
        runtime::wait(async move {
            tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
                let (url, seconds) = (backend.url.clone(), limit.as_secs());
                Err(CheckpointError::Timeout { url, operation: "commit", key, seconds })
            })
        })
    }
}

/// Turns shards by rank into tensors by name.
fn assemble(mut commit: Commit) -> Result<Manifest, String> {
    let world_size = commit.shards.first().map(|shard| shard.world_size).ok_or("there is no shard")?;
    commit.shards.sort_by_key(|shard| shard.rank);
    if commit.shards.len() != world_size {
        let ranks: Vec<usize> = commit.shards.iter().map(|shard| shard.rank).collect();
        return Err(format!("there are shards of ranks {ranks:?}; expected one of each of {world_size} ranks"));
    }
    let mut tensors: BTreeMap<String, TensorEntry> = BTreeMap::new();
    let mut shards = Vec::with_capacity(world_size);
    let mut parts = Vec::with_capacity(world_size);
    for (rank, shard) in commit.shards.into_iter().enumerate() {
        let found = (shard.rank, shard.world_size, shard.attempt, shard.step);
        let expected = (rank, world_size, commit.attempt, commit.step);
        if found != expected {
            return Err(format!(
                "there is a shard of (rank, world size, attempt, step) {found:?}; expected {expected:?}"
            ));
        }
        if shard.parts.is_empty() {
            return Err(format!("the shard of rank {rank} has no object"));
        }
        parts.extend(shard.parts.into_iter().map(|part| (rank, part)));
    }
    for (rank, part) in parts {
        for slice in part.tensors {
            let place = SliceEntry {
                shard: shards.len(),
                start_numel: slice.start_numel,
                end_numel: slice.end_numel,
                offset_bytes: slice.offset_bytes,
            };
            match tensors.entry(slice.name) {
                Entry::Vacant(new) => {
                    new.insert(TensorEntry { dtype: slice.dtype, shape: slice.shape, slices: vec![place] });
                }
                Entry::Occupied(mut known) => {
                    if (known.get().dtype, &known.get().shape) != (slice.dtype, &slice.shape) {
                        return Err(format!(
                            "tensor `{}` is {:?} {:?} on rank {rank}, but {:?} {:?} on a lower rank",
                            known.key(),
                            slice.dtype,
                            slice.shape,
                            known.get().dtype,
                            known.get().shape
                        ));
                    }
                    known.get_mut().slices.push(place);
                }
            }
        }
        shards.push(ObjectRecord { key: part.key, bytes: part.bytes, chunks: part.chunks });
    }
    tensors.values_mut().for_each(|tensor| tensor.slices.sort_by_key(|slice| (slice.start_numel, slice.end_numel)));
    Ok(Manifest {
        format: FORMAT.name.to_owned(),
        version: FORMAT.version,
        step: commit.step,
        optimizer_step: commit.optimizer_step,
        attempt: commit.attempt,
        resumed_from: None,
        world_size,
        created_unix_ms: unix_ms(),
        writer: concat!("ditharos ", env!("CARGO_PKG_VERSION")).to_owned(),
        config: commit.config,
        decision_log: commit.decision_log,
        recent_losses: commit.recent_losses,
        metrics: commit.metrics,
        put_off: commit.put_off,
        chunk_bytes: CHUNK_BYTES,
        shards,
        tensors,
    })
}
