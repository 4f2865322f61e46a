//! The few store operations that the protocol needs, each with a deadline, each naming key and URL when it fails.

use crate::{
    chunk::{CHUNK_BYTES, Fingerprint, Sha256Digest, fingerprint},
    error::CheckpointError,
    location::redact_text,
    sealed::MAX_SEALED_BYTES,
    store::StoreOptions,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};
use std::{ops::Range, path::PathBuf, sync::Arc, time::Duration};
use tokio::time::Instant;

/// How often a create whose outcome is unknown is tried again.
const CREATE_TRIES: u32 = 5;
/// Deletes in flight.
const DELETES: usize = 8;

#[derive(Debug)]
pub(crate) struct Backend {
    pub store: Arc<dyn ObjectStore>,
    pub root: Path,
    pub url: String,
    /// The folder behind a `file://` URL.
    pub folder: Option<PathBuf>,
    pub options: StoreOptions,
}

/// How a create-if-absent ended.
#[derive(Debug, PartialEq)]
#[must_use]
pub(crate) enum Landed {
    /// The object holds the bytes that were to be written.
    Ours,
    /// The object holds other bytes; they were not touched.
    Theirs,
}

/// A failed operation and what it says about the object.
pub(crate) struct Failure {
    pub kind: FailureKind,
    pub error: CheckpointError,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum FailureKind {
    Absent,
    Exists,
    /// Trying again cannot help: no permission, not supported.
    Final,
    Unknown,
}

impl From<Failure> for CheckpointError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

/// An operation's last moment, and its length for the message.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    at: Instant,
    allowed: Duration,
}

impl Backend {
    /// The deadline of an operation on an object of `bytes`, starting now.
    pub fn deadline(&self, bytes: u64) -> Deadline {
        let allowed = self.options.op_timeout + Duration::from_secs(bytes / self.options.min_bytes_per_s.max(1));
        Deadline { at: Instant::now() + allowed, allowed }
    }

    pub fn damaged(&self, key: &str, reason: impl Into<String>) -> CheckpointError {
        CheckpointError::Damaged { url: self.url.clone(), key: key.to_owned(), reason: reason.into() }
    }

    pub fn missing(&self, key: &str) -> CheckpointError {
        CheckpointError::Missing { url: self.url.clone(), key: key.to_owned() }
    }

    fn path(&self, key: &str) -> Result<Path, Failure> {
        let full = if self.root.as_ref().is_empty() { key.to_owned() } else { format!("{}/{key}", self.root) };
        Path::parse(full)
            .map_err(|e| Failure { kind: FailureKind::Final, error: self.failed("address", key, e.to_string()) })
    }

    fn failed(&self, operation: &'static str, key: &str, reason: String) -> CheckpointError {
        CheckpointError::Store { url: self.url.clone(), operation, key: key.to_owned(), reason: redact_text(&reason) }
    }

    async fn bounded<T>(
        &self,
        operation: &'static str,
        key: &str,
        deadline: Deadline,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, Failure> {
        use object_store::Error as E;
        match tokio::time::timeout_at(deadline.at, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                let kind = match &error {
                    E::NotFound { .. } => FailureKind::Absent,
                    E::AlreadyExists { .. } | E::Precondition { .. } => FailureKind::Exists,
                    E::NotSupported { .. }
                    | E::NotImplemented { .. }
                    | E::PermissionDenied { .. }
                    | E::Unauthenticated { .. }
                    | E::InvalidPath { .. }
                    | E::UnknownConfigurationKey { .. } => FailureKind::Final,
                    _ => FailureKind::Unknown,
                };
                let error = match kind {
                    FailureKind::Absent => self.missing(key),
                    _ => self.failed(operation, key, error.to_string()),
                };
                Err(Failure { kind, error })
            }
            Err(_) => {
                let seconds = deadline.allowed.as_secs();
                let error = CheckpointError::Timeout { url: self.url.clone(), operation, key: key.to_owned(), seconds };
                Err(Failure { kind: FailureKind::Unknown, error })
            }
        }
    }

    /// Keys below `folder`, relative to the run folder, in no particular order. A folder that does not exist is empty.
    pub async fn list(&self, folder: &str) -> Result<Vec<String>, CheckpointError> {
        let prefix = self.path(folder)?;
        let listing = self.store.list(Some(&prefix)).map_ok(|meta| meta.location).try_collect::<Vec<Path>>();
        let paths = self.bounded("list", folder, self.deadline(0), listing).await?;
        let below_root = |path: &Path| match self.root.as_ref() {
            "" => Some(path.as_ref().to_owned()),
            root => Some(path.as_ref().strip_prefix(root)?.strip_prefix('/')?.to_owned()),
        };
        Ok(paths.iter().filter_map(below_root).collect())
    }

    /// A whole sealed object.
    pub async fn get_small(&self, key: &str) -> Result<Bytes, Failure> {
        let path = self.path(key)?;
        let deadline = self.deadline(0);
        let result = self.bounded("read", key, deadline, self.store.get(&path)).await?;
        let bytes = result.meta.size;
        if bytes > MAX_SEALED_BYTES {
            let error = self.damaged(key, format!("{bytes} bytes; expected JSON of at most {MAX_SEALED_BYTES}"));
            return Err(Failure { kind: FailureKind::Final, error });
        }
        self.bounded("read", key, self.deadline(bytes), result.bytes()).await
    }

    /// The length of an object.
    pub async fn size_bytes(&self, key: &str) -> Result<u64, Failure> {
        let path = self.path(key)?;
        Ok(self.bounded("look up", key, self.deadline(0), self.store.head(&path)).await?.size)
    }

    /// Chunk `index` of an object that was written with `fingerprint`, verified.
    pub async fn get_chunk(
        &self,
        key: &str,
        object_bytes: u64,
        chunk_bytes: u64,
        index: usize,
        expected: Sha256Digest,
    ) -> Result<Bytes, Failure> {
        let start = index as u64 * chunk_bytes;
        let range = start..object_bytes.min(start.saturating_add(chunk_bytes));
        let wrong = |reason: String| Failure { kind: FailureKind::Final, error: self.damaged(key, reason) };
        let (bytes, size_bytes) = match self.get_range(key, range.clone()).await {
            Ok(found) => found,
            // A range beyond the end of a truncated object fails in as many ways as there are stores: ask for the length.
            Err(failure) if failure.kind == FailureKind::Unknown => match self.size_bytes(key).await {
                Ok(size) if size != object_bytes => (Bytes::new(), size),
                Err(Failure { kind: FailureKind::Absent, error }) => {
                    return Err(Failure { kind: FailureKind::Absent, error });
                }
                _ => return Err(failure),
            },
            Err(failure) => return Err(failure),
        };
        if size_bytes != object_bytes {
            return Err(wrong(format!("it has {size_bytes} bytes, but it was written with {object_bytes}")));
        }
        let found = Sha256Digest::of(&bytes);
        if found != expected {
            return Err(wrong(format!(
                "its bytes {} to {} have SHA-256 {found}, but they were written with {expected}",
                range.start, range.end
            )));
        }
        Ok(bytes)
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<(Bytes, u64), Failure> {
        let path = self.path(key)?;
        let deadline = self.deadline(range.end - range.start);
        let work = async {
            // An empty object has no range to ask for.
            let options = if range.is_empty() { GetOptions::new() } else { GetOptions::new().with_range(Some(range)) };
            let result = self.store.get_opts(&path, options).await?;
            let size = result.meta.size;
            Ok((result.bytes().await?, size))
        };
        self.bounded("read", key, deadline, work).await
    }

    /// Creates an object that must not exist yet. Whenever the answer leaves room for doubt (`AlreadyExists` from stores
    /// that retried by themselves or that answer so for a lost race in which nothing landed, a broken connection, a
    /// time-out), the object is read back: own bytes are success, none means try again.
    /// With `confirm`, success is read back too. The deadline is that of sending and reading back `time_for_bytes`.
    pub async fn create(
        &self,
        key: &str,
        payload: PutPayload,
        fingerprint: &Fingerprint,
        time_for_bytes: u64,
        confirm: bool,
    ) -> Result<Landed, CheckpointError> {
        let path = self.path(key)?;
        let deadline = self.deadline(2 * time_for_bytes);
        let mut last = None;
        for attempt in 0..CREATE_TRIES {
            if attempt > 0 {
                let pause = Instant::now() + Duration::from_millis(25 << (2 * attempt));
                if pause >= deadline.at {
                    break;
                }
                tokio::time::sleep_until(pause).await;
            }
            let put = self.store.put_opts(&path, payload.clone(), PutMode::Create.into());
            match self.bounded("create", key, deadline, put).await {
                Ok(_) if !confirm => return Ok(Landed::Ours),
                Ok(_) => last = None,
                Err(failure) if failure.kind == FailureKind::Final => return Err(failure.error),
                Err(failure) => last = Some(failure.error),
            }
            match self.matches(key, fingerprint).await {
                Ok(Some(true)) => return Ok(Landed::Ours),
                Ok(Some(false)) => return Ok(Landed::Theirs),
                Ok(None) => {}
                Err(error) => last = last.or(Some(error)),
            }
        }
        Err(last.unwrap_or_else(|| {
            self.failed("create", key, "the store reported success, but the object is not there".to_owned())
        }))
    }

    /// Creates a small object, read back before success is believed.
    pub async fn create_small(&self, key: &str, bytes: &[u8]) -> Result<Landed, CheckpointError> {
        let bytes = Bytes::copy_from_slice(bytes);
        let fingerprint = fingerprint(std::slice::from_ref(&bytes));
        self.create(key, bytes.into(), &fingerprint, fingerprint.bytes, true).await
    }

    /// Whether the object's bytes are those of `fingerprint`; `None` if there is no object.
    async fn matches(&self, key: &str, fingerprint: &Fingerprint) -> Result<Option<bool>, CheckpointError> {
        match self.size_bytes(key).await {
            Ok(bytes) if bytes != fingerprint.bytes => return Ok(Some(false)),
            Ok(_) => {}
            Err(failure) if failure.kind == FailureKind::Absent => return Ok(None),
            Err(failure) => return Err(failure.error),
        }
        for (index, digest) in fingerprint.chunks.iter().enumerate() {
            match self.get_chunk(key, fingerprint.bytes, CHUNK_BYTES, index, *digest).await {
                Ok(_) => {}
                Err(failure) if failure.kind == FailureKind::Absent => return Ok(None),
                Err(failure) if failure.error.is_damage() => return Ok(Some(false)),
                Err(failure) => return Err(failure.error),
            }
        }
        Ok(Some(true))
    }

    /// Deletes objects; those already gone are fine. All are tried, the first failure is returned.
    pub async fn delete(&self, keys: &[String]) -> Result<(), CheckpointError> {
        let results: Vec<Result<(), Failure>> = futures::stream::iter(0..keys.len())
            .map(|index| async move {
                let key = &keys[index];
                let path = self.path(key)?;
                match self.bounded("delete", key, self.deadline(0), self.store.delete(&path)).await {
                    Err(failure) if failure.kind == FailureKind::Absent => Ok(()),
                    other => other,
                }
            })
            .buffered(DELETES)
            .collect()
            .await;
        results.into_iter().collect::<Result<(), Failure>>().map_err(CheckpointError::from)
    }
}
