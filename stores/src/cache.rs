//! Blocks of remote objects on a local disk, shared by all processes that name the same folder.
//!
//! A cache never makes a read fail: what cannot be read from it is fetched again, what cannot be written to it is not kept.

mod block;
mod flight;
mod folder;

pub(crate) use block::{BLOCK_BYTES, BlockKey};
use bytes::Bytes;
pub(crate) use flight::Claim;
use flight::Flights;
use folder::Folder;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// A folder that cannot hold a cache.
#[derive(Debug, thiserror::Error)]
#[error("{dir}: cannot be used as a cache: {reason}; give a folder on a local disk that this user can write to")]
pub struct CacheError {
    /// The folder.
    pub dir: String,
    /// What the system said.
    pub reason: io::Error,
}

/// A bounded cache of blocks in a folder.
pub struct BlockCache {
    dir: PathBuf,
    folder: Folder,
    flights: Flights,
    /// Nothing more is written.
    full: AtomicBool,
    warn: Box<dyn Fn(&str) + Send + Sync>,
}

impl fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlockCache").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl BlockCache {
    /// The least that a cache can be bounded to.
    pub const LEAST_BYTES: u64 = 16 << 20;

    /// Opens the cache in `dir`, which is made if it is not there, and removes blocks until at most `bytes` (at least
    /// [`BlockCache::LEAST_BYTES`]) are left. `warn` is told, once, when the disk takes nothing more.
    ///
    /// # Errors
    /// If the folder cannot be made or written to.
    pub fn open(dir: &Path, bytes: u64, warn: impl Fn(&str) + Send + Sync + 'static) -> Result<Self, CacheError> {
        let folder = Folder::open(dir, bytes.max(Self::LEAST_BYTES))
            .map_err(|reason| CacheError { dir: dir.display().to_string(), reason })?;
        let (flights, full) = (Flights::default(), AtomicBool::new(false));
        Ok(Self { dir: dir.to_owned(), folder, flights, full, warn: Box::new(warn) })
    }

    /// `$XDG_CACHE_HOME/ditharos/blocks`, or `~/.cache/ditharos/blocks`; `None` if neither variable is set.
    pub fn default_dir() -> Option<PathBuf> {
        let folder = |variable| std::env::var_os(variable).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
        Some(cache.join("ditharos/blocks"))
    }

    pub(crate) fn claim(&self, key: BlockKey) -> Claim {
        self.flights.claim(key)
    }

    /// A block of `bytes`, if it is here and sound. One that is not sound is removed.
    pub(crate) async fn load(self: Arc<Self>, key: BlockKey, bytes: u64) -> Option<Bytes> {
        blocking(move || {
            // A block that cannot be read is as good as none.
            let file = self.folder.read(&key).ok().flatten()?;
            let block = block::open(file, &key, bytes);
            if block.is_none() {
                self.folder.remove(&key);
            }
            block
        })
        .await
        .flatten()
    }

    /// Keeps a block.
    pub(crate) async fn store(self: &Arc<Self>, key: BlockKey, block: Bytes) {
        if self.full.load(Relaxed) {
            return;
        }
        let cache = self.clone();
        let written = blocking(move || cache.folder.write(&key, &block)).await;
        if let Some(Err(error)) = written
            && !self.full.swap(true, Relaxed)
        {
            let dir = self.dir.display();
            (self.warn)(&format!(
                "{dir}: the cache takes nothing more in this process: {error}; reading goes on without it"
            ));
        }
    }
}

/// `None` only if the runtime is being shut down.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    tokio::task::spawn_blocking(work).await.ok()
}
