//! Where a conversion ends up: a folder that appears whole, or an object store.
//!
//! Local files are written to a hidden folder `.NAME.partial` beside the target, which gets its name at the end. Parts that go to
//! an object store are uploaded one by one, each whole or not at all; their names `…-of-00008.parquet` say how many there will
//! be, so readers refuse a set of which some are missing.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use object_store::{ObjectStoreExt, PutPayload};

use super::files::Place;
use crate::DataError;

/// A file in the hidden folder that says whose it is, and is locked while it is written to.
const MARK: &str = ".ditharos-partial";
/// Pieces of an upload. Stores take at most 10,000.
const PIECE_BYTES: u64 = 16 << 20;
const MOST_PIECES: u64 = 9_000;

/// A target that is being written.
pub(super) struct Destination {
    place: Place,
    folder: PathBuf,
    /// Gone with the value, and with it the lock.
    _mark: Option<File>,
    scratch: Option<tempfile::TempDir>,
}

impl Destination {
    /// Prepares to write `files` (for object stores, where they must be known) to a place. What an earlier attempt that
    /// was killed has left is removed.
    ///
    /// # Errors
    /// If something is there already, or another process is writing there.
    pub fn create(place: Place, files: &[String]) -> Result<Self, DataError> {
        let name = place.name();
        let refuse = |reason: String| DataError::Write { file: name.clone(), reason };
        let Place::Local(target) = &place else {
            refuse_other_objects(&place, files)?;
            let scratch = tempfile::tempdir().map_err(|error| refuse(format!("no scratch folder: {error}")))?;
            return Ok(Self { folder: scratch.path().to_owned(), place, _mark: None, scratch: Some(scratch) });
        };
        match std::fs::read_dir(target).map(|mut entries| entries.next().is_none()) {
            Ok(true) => {}
            Ok(false) => return Err(refuse("the folder is not empty; choose another or remove what is in it".into())),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(refuse(error.to_string())),
        }
        let (Some(parent), Some(file_name)) = (target.parent(), target.file_name()) else {
            return Err(refuse("is no name of a folder that can be made".into()));
        };
        let folder = parent.join(format!(".{}.partial", file_name.to_string_lossy()));
        let failed = |error: std::io::Error| refuse(format!("{}: {error}", folder.display()));
        let mark = folder.join(MARK);
        if folder.exists() {
            let old = File::open(&mark).map_err(|_| {
                refuse(format!("{} is in the way and not from an earlier attempt; remove it", folder.display()))
            })?;
            if old.try_lock().is_err() {
                return Err(refuse(format!("another process is writing to {}", folder.display())));
            }
            std::fs::remove_dir_all(&folder).map_err(failed)?;
        }
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let mark = File::create(mark).map_err(failed)?;
        mark.try_lock().map_err(|error| refuse(format!("{}: {error}", folder.display())))?;
        Ok(Self { folder, place, _mark: Some(mark), scratch: None })
    }

    /// The folder to write to.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A file of the folder is finished: uploads it, where the target is an object store.
    ///
    /// # Errors
    /// If the upload fails.
    pub fn finished(&self, file: &str) -> Result<(), DataError> {
        if self.scratch.is_none() {
            return Ok(());
        }
        let path = self.folder.join(file);
        self.upload(&path, file)?;
        std::fs::remove_file(&path)
            .map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })
    }

    /// Gives the folder its name.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn complete(self) -> Result<(), DataError> {
        let Place::Local(target) = &self.place else { return Ok(()) };
        let publish = || -> std::io::Result<()> {
            std::fs::remove_file(self.folder.join(MARK))?;
            File::open(&self.folder)?.sync_all()?;
            // An empty folder is replaced, any other thing that has come there meanwhile is not.
            std::fs::rename(&self.folder, target)?;
            match target.parent() {
                Some(parent) => File::open(parent)?.sync_all(),
                None => Ok(()),
            }
        };
        publish().map_err(|error| DataError::Write {
            file: target.display().to_string(),
            reason: format!("{} is complete but cannot be renamed: {error}", self.folder.display()),
        })
    }

    /// Removes what is there after an error.
    pub fn abandon(self) {
        if self.scratch.is_none() {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    fn upload(&self, path: &Path, name: &str) -> Result<(), DataError> {
        let Place::Remote(remote, object) = self.place.join(name) else { return Ok(()) };
        let target = self.place.join(name).name();
        let failed = |reason: String| DataError::Write { file: target.clone(), reason: format!("upload: {reason}") };
        let upload = async {
            let mut file = File::open(path).map_err(|error| failed(error.to_string()))?;
            let bytes = file.metadata().map_err(|error| failed(error.to_string()))?.len();
            let piece_bytes = PIECE_BYTES.max(bytes.div_ceil(MOST_PIECES));
            let mut read = |bytes: u64| {
                let mut piece = vec![0; bytes as usize];
                file.read_exact(&mut piece).map_err(|error| failed(error.to_string()))?;
                Ok::<_, DataError>(PutPayload::from(piece))
            };
            let of_store = |error: object_store::Error| failed(error.to_string());
            if bytes <= piece_bytes {
                return remote.store.put(&object, read(bytes)?).await.map(|_| ()).map_err(of_store);
            }
            let mut pieces = remote.store.put_multipart(&object).await.map_err(of_store)?;
            let mut left = bytes;
            while left > 0 {
                let piece = read(left.min(piece_bytes))?;
                left -= left.min(piece_bytes);
                if let Err(error) = pieces.put_part(piece).await {
                    // The error is the one to report.
                    let _ = pieces.abort().await;
                    return Err(of_store(error));
                }
            }
            pieces.complete().await.map(|_| ()).map_err(of_store)
        };
        remote.io.block_on(upload)
    }
}

/// Refuses a place in a store with other parquet files than those of an earlier attempt that was not finished.
fn refuse_other_objects(place: &Place, files: &[String]) -> Result<(), DataError> {
    let there: BTreeSet<String> = place.list()?.files.into_iter().filter(|name| name.ends_with(".parquet")).collect();
    let ours: BTreeSet<String> = files.iter().cloned().collect();
    let reason = if let Some(other) = there.difference(&ours).next() {
        format!("`{other}` is there already; choose another place or remove it")
    } else if !there.is_empty() && there == ours {
        "a complete data set is there already; choose another place or remove it".to_owned()
    } else {
        return Ok(());
    };
    Err(DataError::Write { file: place.name(), reason })
}
