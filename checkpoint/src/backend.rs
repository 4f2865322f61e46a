//! The few store operations that the protocol needs, each with a deadline, each naming key and URL when it fails.

use crate::{
    chunk::{CHUNK_BYTES, ChunkDigest, ChunkDigests, Fingerprint, fingerprint},
    error::CheckpointError,
    local::Buffers,
    sealed::MAX_SEALED_BYTES,
    store::StoreOptions,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::{GetOptions, ObjectStore, ObjectStoreExt, PutMode, PutPayload, path::Path};
use std::{ops::Range, path::PathBuf, sync::Arc, time::Duration};
use stores::redact_text;
use tokio::time::Instant;

/// How often an operation that failed for a reason which may pass is tried in all. Clients of remote stores also try by
/// themselves; this covers the stores that do not, and answers that only we can judge.
const TRIES: u32 = 5;
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

/// A chunk of an object and what it was written with.
#[derive(Debug, Clone)]
pub(crate) struct ChunkRef {
    pub key: String,
    /// Length of the whole object.
    pub object_bytes: u64,
    /// Where the chunk lies in it.
    pub range: Range<u64>,
    pub expected: ChunkDigest,
}

impl ChunkRef {
    /// Chunk `index` of an object with these digests.
    pub fn new(key: &str, object_bytes: u64, chunk_bytes: u64, index: usize, digests: &ChunkDigests) -> Self {
        let start = index as u64 * chunk_bytes;
        let range = start..object_bytes.min(start.saturating_add(chunk_bytes));
        Self { key: key.to_owned(), object_bytes, range, expected: digests.expected(index) }
    }

    pub fn bytes(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }
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

    pub async fn bounded<T>(
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

    /// Waits before try number `attempt`; false if the deadline comes first.
    async fn pause(&self, attempt: u32, deadline: Deadline) -> bool {
        let until = Instant::now() + self.options.retry_pause * 4u32.pow(attempt - 1);
        let in_time = until < deadline.at;
        if in_time {
            tokio::time::sleep_until(until).await;
        }
        in_time
    }

    /// [`Backend::bounded`], tried again while the reason may pass. Only for operations that change nothing, or nothing more
    /// the second time.
    async fn retried<T, W: Future<Output = object_store::Result<T>>>(
        &self,
        operation: &'static str,
        key: &str,
        deadline: Deadline,
        work: impl Fn() -> W,
    ) -> Result<T, Failure> {
        self.tried(TRIES, operation, key, deadline, work).await
    }

    async fn tried<T, W: Future<Output = object_store::Result<T>>>(
        &self,
        tries: u32,
        operation: &'static str,
        key: &str,
        deadline: Deadline,
        work: impl Fn() -> W,
    ) -> Result<T, Failure> {
        let mut attempt = 1;
        loop {
            match self.bounded(operation, key, deadline, work()).await {
                Err(failure) if failure.kind == FailureKind::Unknown && attempt < tries => {
                    if !self.pause(attempt, deadline).await {
                        return Err(failure);
                    }
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    /// Keys below `folder`, relative to the run folder, in no particular order. A folder that does not exist is empty.
    pub async fn list(&self, folder: &str) -> Result<Vec<String>, CheckpointError> {
        let prefix = self.path(folder)?;
        let listing = || self.store.list(Some(&prefix)).map_ok(|meta| meta.location).try_collect::<Vec<Path>>();
        let paths = self.retried("list", folder, self.deadline(0), listing).await?;
        let below_root = |path: &Path| match self.root.as_ref() {
            "" => Some(path.as_ref().to_owned()),
            root => Some(path.as_ref().strip_prefix(root)?.strip_prefix('/')?.to_owned()),
        };
        Ok(paths.iter().filter_map(below_root).collect())
    }

    /// A whole sealed object.
    pub async fn get_small(&self, key: &str) -> Result<Bytes, Failure> {
        let path = self.path(key)?;
        let bytes = self.size_bytes(key).await?;
        if bytes > MAX_SEALED_BYTES {
            let error = self.damaged(key, format!("{bytes} bytes; expected JSON of at most {MAX_SEALED_BYTES}"));
            return Err(Failure { kind: FailureKind::Final, error });
        }
        // The object never changes, so what was looked up still holds; a shorter body is a broken transfer.
        let read = || async {
            let body = self.store.get(&path).await?.bytes().await?;
            if body.len() as u64 == bytes { Ok(body) } else { Err(cut_short(body.len(), bytes)) }
        };
        self.retried("read", key, self.deadline(bytes), read).await
    }

    /// The length of an object.
    pub async fn size_bytes(&self, key: &str) -> Result<u64, Failure> {
        let path = self.path(key)?;
        Ok(self.retried("look up", key, self.deadline(0), || self.store.head(&path)).await?.size)
    }

    /// A chunk, verified.
    pub async fn get_chunk(&self, chunk: &ChunkRef, buffers: &Buffers) -> Result<Bytes, Failure> {
        let ChunkRef { key, object_bytes, range, expected } = chunk;
        let wrong = |reason: String| Failure { kind: FailureKind::Final, error: self.damaged(key, reason) };
        let (mut bytes, size_bytes) = match self.get_range(key, range.clone(), 1, buffers).await {
            Ok(found) => found,
            // A range beyond the end of a truncated object fails in as many ways as there are stores: ask for the length.
            Err(failure) if failure.kind == FailureKind::Unknown => match self.size_bytes(key).await {
                Ok(size) if size != *object_bytes => (Bytes::new(), size),
                Ok(_) => self.get_range(key, range.clone(), TRIES, buffers).await?,
                Err(failure) => return Err(failure),
            },
            Err(failure) => return Err(failure),
        };
        if size_bytes != *object_bytes {
            return Err(wrong(format!("it has {size_bytes} bytes, but it was written with {object_bytes}")));
        }
        let mut found = expected.same_kind_of(&bytes);
        // Bytes can be spoilt on their way too: the object is called damaged only if they are wrong twice.
        if found != *expected {
            bytes = self.get_range(key, range.clone(), TRIES, buffers).await?.0;
            found = expected.same_kind_of(&bytes);
        }
        if found != *expected {
            return Err(wrong(format!(
                "its bytes {} to {} have {found}, but they were written with {expected}",
                range.start, range.end
            )));
        }
        Ok(bytes)
    }

    /// Bytes of an object, and its length.
    async fn get_range(
        &self,
        key: &str,
        range: Range<u64>,
        tries: u32,
        buffers: &Buffers,
    ) -> Result<(Bytes, u64), Failure> {
        let path = self.path(key)?;
        let deadline = self.deadline(range.end - range.start);
        let work = || async {
            if let Some(folder) = &self.folder {
                let (file, range, buffers) = (folder.join(key), range.clone(), buffers.clone());
                let read = tokio::task::spawn_blocking(move || buffers.read(&file, range)).await;
                return read.unwrap_or_else(|e| Err(e.into())).map_err(|e| of_file(key, e));
            }
            // An empty object has no range to ask for.
            let wanted = (!range.is_empty()).then(|| range.clone());
            let result = self.store.get_opts(&path, GetOptions::new().with_range(wanted)).await?;
            let (size, sent) = (result.meta.size, result.range.end - result.range.start);
            let body = result.bytes().await?;
            if body.len() as u64 == sent { Ok((body, size)) } else { Err(cut_short(body.len(), sent)) }
        };
        self.tried(tries, "read", key, deadline, work).await
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
        for attempt in 0..TRIES {
            if attempt > 0 && !self.pause(attempt, deadline).await {
                break;
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

    /// Creates a small object, read back before success is believed. On a store whose writes are not atomic, our own write may
    /// have ended half-way and would stand in the way for ever: what is only a beginning of our bytes is removed and written
    /// again. Whoever else may have begun it has not finished it either.
    pub async fn create_small(&self, key: &str, bytes: &[u8]) -> Result<Landed, CheckpointError> {
        let bytes = Bytes::copy_from_slice(bytes);
        let fingerprint = fingerprint(std::slice::from_ref(&bytes));
        for _ in 0..TRIES {
            if self.create(key, bytes.clone().into(), &fingerprint, fingerprint.bytes, true).await? == Landed::Ours {
                return Ok(Landed::Ours);
            }
            match self.get_small(key).await {
                Ok(found) if found.len() < bytes.len() && bytes.starts_with(&found) => {
                    self.delete(&[key.to_owned()]).await?;
                }
                Err(failure) if failure.kind != FailureKind::Absent => return Err(failure.error),
                Ok(_) => return Ok(Landed::Theirs),
                Err(_) => {}
            }
        }
        Ok(Landed::Theirs)
    }

    /// Whether the object's bytes are those of `fingerprint`; `None` if there is no object.
    async fn matches(&self, key: &str, fingerprint: &Fingerprint) -> Result<Option<bool>, CheckpointError> {
        match self.size_bytes(key).await {
            Ok(bytes) if bytes != fingerprint.bytes => return Ok(Some(false)),
            Ok(_) => {}
            Err(failure) if failure.kind == FailureKind::Absent => return Ok(None),
            Err(failure) => return Err(failure.error),
        }
        let buffers = Buffers::default();
        for index in 0..fingerprint.chunks.count() {
            let chunk = ChunkRef::new(key, fingerprint.bytes, CHUNK_BYTES, index, &fingerprint.chunks);
            match self.get_chunk(&chunk, &buffers).await {
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
                match self.retried("delete", key, self.deadline(0), || self.store.delete(&path)).await {
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

fn of_file(key: &str, error: std::io::Error) -> object_store::Error {
    use object_store::Error as E;
    let kind = error.kind();
    let source = Box::new(error);
    match kind {
        std::io::ErrorKind::NotFound => E::NotFound { path: key.to_owned(), source },
        std::io::ErrorKind::PermissionDenied => E::PermissionDenied { path: key.to_owned(), source },
        _ => E::Generic { store: "file", source },
    }
}

/// A body that ended before its announced length.
fn cut_short(found: usize, announced: u64) -> object_store::Error {
    let source = format!("the body ended after {found} of {announced} bytes").into();
    object_store::Error::Generic { store: "transfer", source }
}
