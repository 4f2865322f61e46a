//! A run's folder in an object store.

use crate::{
    backend::Backend,
    chunk::Digest,
    error::CheckpointError,
    location::{self, Folder, Location},
    metric::MetricsCache,
};
use object_store::{ObjectStore, path::Path};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

/// Bounds on a store's time.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Longest time for an operation on a small object, retries included. Default 30 s.
    pub op_timeout: Duration,
    /// Operations on large objects get `op_timeout` and their bytes at this rate. Default 4 MiB/s.
    pub min_bytes_per_s: u64,
    /// Most bytes of data in one object of a shard. Default 256 MiB.
    pub part_bytes: u64,
    /// Longest time for a rank's whole shard, and for a commit. Default 1 hour.
    pub upload_timeout: Duration,
    /// Pause before an operation that failed is tried again; it grows fourfold from try to try. Default 50 ms.
    pub retry_pause: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            op_timeout: Duration::from_secs(30),
            min_bytes_per_s: 4 << 20,
            part_bytes: 256 << 20,
            upload_timeout: Duration::from_secs(3600),
            retry_pause: Duration::from_millis(50),
        }
    }
}

/// A run's folder in an object store. Cheap to clone; all methods block and may be called from any thread.
#[derive(Debug, Clone)]
pub struct RunStore {
    pub(crate) backend: Arc<Backend>,
    /// Attempts claimed through this value, with the digest of their record: a store whose create-if-absent has several
    /// winners is noticed when the record turns out to be another's.
    pub(crate) claimed: Arc<Mutex<HashMap<u32, Digest>>>,
    /// So that retention reads each manifest once.
    pub(crate) metrics: Arc<MetricsCache>,
}

impl RunStore {
    /// Opens the run folder at `url` for writing: `file:///…` or a path (the folder is made and proved writable, every write is
    /// followed by fsync of file and folder), `memory:///name` (shared within the process), `s3://`, `gs://`, `az://`.
    /// Credentials and endpoints come from the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`).
    /// A remote store is first asked by the first operation on it.
    ///
    /// # Errors
    /// [`CheckpointError::BadUrl`], [`CheckpointError::Unwritable`].
    pub fn open(url: &str) -> Result<Self, CheckpointError> {
        Self::open_with(url, StoreOptions::default())
    }

    /// [`RunStore::open`] with other bounds on time.
    ///
    /// # Errors
    /// As [`RunStore::open`].
    pub fn open_with(url: &str, options: StoreOptions) -> Result<Self, CheckpointError> {
        Ok(Self::at(location::open(url, Folder::Create, &options)?, options))
    }

    /// Opens a run folder that must already be there, to read it: makes no folder and writes nothing. Also takes `https://`.
    ///
    /// # Errors
    /// [`CheckpointError::BadUrl`], also if a local folder does not exist.
    pub fn open_existing(url: &str) -> Result<Self, CheckpointError> {
        let options = StoreOptions::default();
        Ok(Self::at(location::open(url, Folder::Existing, &options)?, options))
    }

    /// A run under `root` of any store, for wrappers (throttling, faults). `url` names it in errors.
    ///
    /// # Errors
    /// [`CheckpointError::BadUrl`] if `root` is not a path of normal segments.
    pub fn over(
        store: Arc<dyn ObjectStore>,
        root: &str,
        url: &str,
        options: StoreOptions,
    ) -> Result<Self, CheckpointError> {
        let url = stores::redact_text(url);
        let root =
            Path::parse(root).map_err(|e| CheckpointError::BadUrl { url: url.clone(), reason: e.to_string() })?;
        Ok(Self::at(Location { store, root, url, folder: None }, options))
    }

    /// The run's URL, without user-info and query: safe to print.
    pub fn url(&self) -> &str {
        &self.backend.url
    }

    fn at(location: Location, options: StoreOptions) -> Self {
        let Location { store, root, url, folder } = location;
        Self {
            backend: Arc::new(Backend { store, root, url, folder, options }),
            claimed: Arc::default(),
            metrics: Arc::default(),
        }
    }
}
