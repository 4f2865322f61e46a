//! The one error type of this crate.

use crate::resume::Damaged;

/// What can go wrong between a run and its store. URLs in it carry no user-info and no query.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CheckpointError {
    /// The URL does not name a store that this build can use.
    #[error("{url}: not usable as a run folder: {reason}")]
    BadUrl {
        /// Redacted URL.
        url: String,
        /// What was found and what to do.
        reason: String,
    },
    /// The run folder cannot be written.
    #[error("{url}: the run folder cannot be written: {reason}; choose another `run.url` or make this one writable")]
    Unwritable {
        /// Redacted URL.
        url: String,
        /// The cause as the system tells it.
        reason: String,
    },
    /// The store refused an operation or failed in it, retries included.
    #[error("{url}: {operation} `{key}` failed: {reason}")]
    Store {
        /// Redacted URL of the run folder.
        url: String,
        /// "read", "create", "list", "delete", "look up".
        operation: &'static str,
        /// Object key, relative to the run folder.
        key: String,
        /// The cause as the store tells it, redacted.
        reason: String,
    },
    /// The store did not answer in time.
    #[error("{url}: {operation} `{key}` did not finish within {seconds} s; the store is unreachable or too slow")]
    Timeout {
        /// Redacted URL of the run folder.
        url: String,
        /// As in [`CheckpointError::Store`].
        operation: &'static str,
        /// Object key, relative to the run folder.
        key: String,
        /// The deadline that passed.
        seconds: u64,
    },
    /// A rank's shard was not written in the time that the run allows for it.
    #[error(
        "{url}: the shard of rank {rank} at step {step} was not up within {seconds} s: {written_bytes} of {bytes} bytes were; the store is too slow, or allow more time (checkpoint.upload_timeout_s)"
    )]
    SlowUpload {
        /// Redacted URL of the run folder.
        url: String,
        /// The step of the checkpoint.
        step: u64,
        /// The rank whose shard it is.
        rank: usize,
        /// The time allowed.
        seconds: u64,
        /// Bytes of data in the objects that were complete.
        written_bytes: u64,
        /// Bytes of data in all of them.
        bytes: u64,
    },
    /// An object that must exist does not.
    #[error("{url}: `{key}` is missing")]
    Missing {
        /// Redacted URL of the run folder.
        url: String,
        /// Object key, relative to the run folder.
        key: String,
    },
    /// An object is there, but it is not what was written, or not what this crate could have written.
    #[error("{url}: `{key}` is damaged: {reason}")]
    Damaged {
        /// Redacted URL of the run folder.
        url: String,
        /// Object key, relative to the run folder.
        key: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// An intact object of a format version that this build does not know.
    #[error(
        "{url}: `{key}` has format version {found}, this build reads versions up to {supported}; use the Ditharos that wrote it or a newer one"
    )]
    UnknownVersion {
        /// Redacted URL of the run folder.
        url: String,
        /// Object key, relative to the run folder.
        key: String,
        /// The version in the object.
        found: u64,
        /// The newest version that this build reads.
        supported: u64,
    },
    /// Another process took over the run, or wrote other bytes under the same name: stop, nothing of it was changed.
    #[error(
        "{url}: attempt {attempt} has lost the run at `{key}`: {reason}; stop this process, the other one continues"
    )]
    Fenced {
        /// Redacted URL of the run folder.
        url: String,
        /// The attempt that must stop.
        attempt: u32,
        /// The object at which it was noticed, relative to the run folder.
        key: String,
        /// Who is in the way.
        reason: String,
    },
    /// The slices handed to `write_shard` cannot be a shard.
    #[error("shard of rank {rank} at step {step}: {reason}")]
    BadShard {
        /// The step of the checkpoint.
        step: u64,
        /// The rank whose shard it is.
        rank: usize,
        /// Tensor, what was found, what was expected.
        reason: String,
    },
    /// The shards handed to `commit` are not one complete checkpoint; nothing was committed.
    #[error("{url}: step {step} is not committed: {reason}")]
    Incomplete {
        /// Redacted URL of the run folder.
        url: String,
        /// The step of the checkpoint.
        step: u64,
        /// Tensor or rank, what was found, what was expected.
        reason: String,
    },
    /// A read asked for something that the checkpoint does not hold.
    #[error("{url}: checkpoint of step {step}: {reason}")]
    BadRead {
        /// Redacted URL of the run folder.
        url: String,
        /// The step of the checkpoint.
        step: u64,
        /// Tensor, what was asked, what there is.
        reason: String,
    },
    /// Every committed checkpoint is damaged. Starting from nothing would silently discard the run.
    #[error("{url}: none of the {} committed checkpoints can be read; repair the store or start a new run under another `run.url`:{}", .damaged.len(), list(.damaged))]
    AllDamaged {
        /// Redacted URL of the run folder.
        url: String,
        /// Newest first.
        damaged: Vec<Damaged>,
    },
    /// Retention was asked to keep fewer than two checkpoints.
    #[error("retention of {keep_last} checkpoints is refused: keep at least 2, so that a damaged one leaves another")]
    KeepTooFew {
        /// The number asked for.
        keep_last: usize,
    },
    /// A tokio runtime could not be started.
    #[error("cannot start the I/O threads of the checkpoint store: {reason}; raise the limit on processes (ulimit -u)")]
    Runtime {
        /// The cause as the system tells it.
        reason: String,
    },
}

impl CheckpointError {
    /// True if the stored objects themselves are wrong, so that another checkpoint may serve; false if the
    /// store could not be asked, the format is unknown, or the caller erred.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Missing { .. } | Self::Damaged { .. })
    }
}

fn list(damaged: &[Damaged]) -> String {
    damaged.iter().map(|d| format!("\n  {d}")).collect()
}
