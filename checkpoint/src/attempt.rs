//! Attempts: one record per start of the run, claimed by create-if-absent.

use crate::{
    backend::{Backend, Landed},
    chunk::Digest,
    error::CheckpointError,
    keys, runtime,
    sealed::{Format, seal, unix_ms, unseal},
    store::RunStore,
};
use futures::{StreamExt, TryStreamExt};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    hash::{BuildHasher, RandomState},
};

const FORMAT: Format = Format { name: "ditharos-attempt", version: 1 };
/// Attempt records read at a time.
const READS: usize = 16;
/// Claims lost to other processes before giving up.
const CLAIMS: u32 = 100;

/// What a process says about itself when it starts the run.
#[derive(Debug, Clone, Default)]
pub struct AttemptInfo {
    /// The committed step it continues from; `None` if it starts from nothing. Commits of earlier attempts beyond it are
    /// ignored from now on.
    pub resumed_from: Option<u64>,
    /// Number of ranks.
    pub world_size: usize,
    /// Anything for people: host names, versions. No secrets.
    pub details: Value,
}

/// `attempts/0003.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttemptRecord {
    format: String,
    version: u64,
    /// The attempt's number, from 1.
    pub attempt: u32,
    /// The committed step it continued from.
    pub resumed_from: Option<u64>,
    /// Number of ranks.
    pub world_size: usize,
    /// When it was claimed, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Random, so that two processes never write the same bytes.
    pub nonce: String,
    /// As in [`AttemptInfo::details`].
    pub details: Value,
}

impl RunStore {
    /// Claims the next attempt number, above every attempt and every manifest that exists, and returns it.
    /// Called once per start of the run, by rank 0, after the checkpoint to resume from was chosen.
    ///
    /// # Errors
    /// [`CheckpointError::Store`], [`CheckpointError::Timeout`].
    pub fn claim_attempt(&self, info: &AttemptInfo) -> Result<u32, CheckpointError> {
        runtime::wait(async {
            let backend = &self.backend;
            let (records, commits) = tokio::try_join!(attempt_numbers(backend), backend.list(keys::CHECKPOINTS))?;
            let committed = commits.iter().filter_map(|key| Some(keys::parse_manifest(key)?.1));
            let mut attempt = records.into_iter().chain(committed).max().unwrap_or(0);
            for _ in 0..CLAIMS {
                attempt = attempt
                    .checked_add(1)
                    .ok_or_else(|| backend.damaged(&keys::attempt(attempt), "there is no higher attempt number"))?;
                let record = AttemptRecord {
                    format: FORMAT.name.to_owned(),
                    version: FORMAT.version,
                    attempt,
                    resumed_from: info.resumed_from,
                    world_size: info.world_size,
                    created_unix_ms: unix_ms(),
                    nonce: format!("{:016x}{:016x}", random_u64(), random_u64()),
                    details: info.details.clone(),
                };
                let key = keys::attempt(attempt);
                let failed = |reason| CheckpointError::Store {
                    url: backend.url.clone(),
                    operation: "create",
                    key: key.clone(),
                    reason,
                };
                let bytes = seal(&record).map_err(failed)?;
                if backend.create_small(&key, &bytes).await? == Landed::Ours {
                    self.claims().insert(attempt, Digest::sha256(&bytes));
                    return Ok(attempt);
                }
            }
            let reason = format!(
                "{CLAIMS} numbers in a row were taken by other processes: are there so many runs on this folder?"
            );
            Err(CheckpointError::Store {
                url: backend.url.clone(),
                operation: "create",
                key: keys::attempt(attempt),
                reason,
            })
        })
    }

    /// The record of `attempt`.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`], [`CheckpointError::Damaged`], [`CheckpointError::UnknownVersion`], store errors.
    pub fn attempt(&self, attempt: u32) -> Result<AttemptRecord, CheckpointError> {
        runtime::wait(async { Ok(read_attempt(&self.backend, attempt).await?.0) })
    }

    pub(crate) fn claims(&self) -> std::sync::MutexGuard<'_, std::collections::HashMap<u32, Digest>> {
        self.claimed.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The record of `attempt`, which must be the one that this value wrote if this value claimed it.
    pub(crate) async fn own_attempt(&self, attempt: u32) -> Result<AttemptRecord, CheckpointError> {
        let (record, digest) = read_attempt(&self.backend, attempt).await?;
        match self.claims().get(&attempt) {
            Some(claimed) if *claimed != digest => Err(CheckpointError::Fenced {
                url: self.backend.url.clone(),
                attempt,
                key: keys::attempt(attempt),
                reason: "another process holds the same attempt number (the store let two creates win)".to_owned(),
            }),
            _ => Ok(record),
        }
    }
}

pub(crate) async fn attempt_numbers(backend: &Backend) -> Result<Vec<u32>, CheckpointError> {
    Ok(backend.list(keys::ATTEMPTS).await?.iter().filter_map(|key| keys::parse_attempt(key)).collect())
}

async fn read_attempt(backend: &Backend, attempt: u32) -> Result<(AttemptRecord, Digest), CheckpointError> {
    let key = keys::attempt(attempt);
    let bytes = backend.get_small(&key).await?;
    let record: AttemptRecord = unseal(&bytes, &FORMAT, &backend.url, &key)?;
    if record.attempt != attempt {
        return Err(backend.damaged(&key, format!("it is the record of attempt {}", record.attempt)));
    }
    Ok((record, Digest::sha256(&bytes)))
}

/// Every attempt that has a record, above `after`; `None` for a record that cannot be read.
pub(crate) async fn attempts_after(
    backend: &Backend,
    after: u32,
) -> Result<BTreeMap<u32, Option<AttemptRecord>>, CheckpointError> {
    let numbers = attempt_numbers(backend).await?.into_iter().filter(|&number| number > after);
    futures::stream::iter(numbers)
        .map(|number| async move {
            match read_attempt(backend, number).await {
                Ok((record, _)) => Ok((number, Some(record))),
                Err(error) if error.is_damage() => Ok((number, None)),
                Err(error) => Err(error),
            }
        })
        .buffered(READS)
        .try_collect()
        .await
}

/// Fails if a later attempt has taken the run over from before `step`.
pub(crate) async fn check_fence(backend: &Backend, attempt: u32, step: u64) -> Result<(), CheckpointError> {
    let later = attempts_after(backend, attempt).await?;
    match later.values().flatten().find(|record| fences(record.resumed_from, step)) {
        None => Ok(()),
        Some(record) => Err(CheckpointError::Fenced {
            url: backend.url.clone(),
            attempt,
            key: keys::attempt(record.attempt),
            reason: match record.resumed_from {
                Some(from) => format!(
                    "attempt {} resumed from step {from}, so a commit of step {step} would be ignored",
                    record.attempt
                ),
                None => format!(
                    "attempt {} started from nothing, so a commit of step {step} would be ignored",
                    record.attempt
                ),
            },
        }),
    }
}

/// Whether an attempt that resumed from `resumed_from` makes earlier attempts' commits of `step` void.
pub(crate) fn fences(resumed_from: Option<u64>, step: u64) -> bool {
    resumed_from.is_none_or(|from| step > from)
}

/// Random without a generator crate: the standard library seeds its hash maps from the system.
pub(crate) fn random_u64() -> u64 {
    RandomState::new().hash_one(unix_ms())
}
