//! Which checkpoints count, and which of them to resume from.

use crate::{
    attempt::{attempts_after, fences},
    backend::Backend,
    error::CheckpointError,
    keys,
    manifest::{Manifest, read_manifest},
    reader, runtime,
    store::RunStore,
};
use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fmt,
    ops::Bound,
};

/// A commit that counts. That it can be read is another question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// Training step.
    pub step: u64,
    /// The attempt that committed it.
    pub attempt: u32,
    /// The manifest's key, relative to the run folder.
    pub key: String,
}

/// A committed checkpoint that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Training step.
    pub step: u64,
    /// The attempt that committed it.
    pub attempt: u32,
    /// Which object is damaged and how.
    pub reason: String,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {} (attempt {}): {}", self.step, self.attempt, self.reason)
    }
}

impl RunStore {
    /// The commits that count, newest first (by step, then by attempt). A commit of a step beyond the `resumed_from` of any
    /// later attempt does not count: the run was continued from before it.
    ///
    /// An attempt record that is lost or damaged is made up for by the manifests of that attempt, which repeat `resumed_from`; an
    /// attempt that has neither has contributed nothing and is passed over.
    ///
    /// # Errors
    /// Store errors; [`CheckpointError::UnknownVersion`].
    pub fn committed(&self) -> Result<Vec<Committed>, CheckpointError> {
        runtime::wait(committed(&self.backend))
    }

    /// The manifest of a commit, checked in itself; its shards are not read.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`], [`CheckpointError::Damaged`], [`CheckpointError::UnknownVersion`], store errors.
    pub fn manifest(&self, commit: &Committed) -> Result<Manifest, CheckpointError> {
        runtime::wait(read_manifest(&self.backend, commit.step, commit.attempt))
    }

    /// The newest commit that counts and of which every byte is as it was written, with the newer ones that are damaged,
    /// newest first. `None` if nothing was ever committed.
    ///
    /// # Errors
    /// [`CheckpointError::AllDamaged`]; [`CheckpointError::UnknownVersion`] (falling back behind a newer program's checkpoint would
    /// fork the run); store errors, which are never taken for damage.
    pub fn newest_valid(&self) -> Result<Option<(Manifest, Vec<Damaged>)>, CheckpointError> {
        runtime::wait(async { first_valid(&self.backend, committed(&self.backend).await?).await })
    }
}

/// The first of `commits` of which every byte is as it was written, with those before it, which are damaged. `None` if
/// there are none.
pub(crate) async fn first_valid(
    backend: &std::sync::Arc<Backend>,
    commits: Vec<Committed>,
) -> Result<Option<(Manifest, Vec<Damaged>)>, CheckpointError> {
    let mut damaged = Vec::new();
    for commit in commits {
        match read_and_verify(backend, &commit).await {
            Ok(manifest) => return Ok(Some((manifest, damaged))),
            Err(error) if error.is_damage() => {
                damaged.push(Damaged { step: commit.step, attempt: commit.attempt, reason: error.to_string() });
            }
            Err(error) => return Err(error),
        }
    }
    if damaged.is_empty() { Ok(None) } else { Err(CheckpointError::AllDamaged { url: backend.url.clone(), damaged }) }
}

pub(crate) async fn read_and_verify(
    backend: &std::sync::Arc<Backend>,
    commit: &Committed,
) -> Result<Manifest, CheckpointError> {
    let manifest = read_manifest(backend, commit.step, commit.attempt).await?;
    reader::verify(backend, &manifest).await?;
    Ok(manifest)
}

pub(crate) async fn committed(backend: &Backend) -> Result<Vec<Committed>, CheckpointError> {
    // Manifests first: an attempt claimed in between can then only hide commits, never make one of a dead branch count.
    let listing = backend.list(keys::CHECKPOINTS).await?;
    let commits: BTreeSet<(u64, u32)> = listing.iter().filter_map(|key| keys::parse_manifest(key)).collect();
    let mut resumed_from: BTreeMap<u32, Option<u64>> = BTreeMap::new();
    for (number, record) in attempts_after(backend, 0).await? {
        if let Some(record) = record {
            resumed_from.insert(number, record.resumed_from);
        }
    }
    for &(step, attempt) in &commits {
        if let Entry::Vacant(unknown) = resumed_from.entry(attempt) {
            match read_manifest(backend, step, attempt).await {
                Ok(manifest) => {
                    unknown.insert(manifest.resumed_from);
                }
                Err(error) if error.is_damage() => {}
                Err(error) => return Err(error),
            }
        }
    }
    let counts = |&(step, attempt): &(u64, u32)| {
        !resumed_from.range((Bound::Excluded(attempt), Bound::Unbounded)).any(|(_, &from)| fences(from, step))
    };
    let newest_first = commits.into_iter().rev().filter(counts);
    Ok(newest_first.map(|(step, attempt)| Committed { step, attempt, key: keys::manifest(step, attempt) }).collect())
}
