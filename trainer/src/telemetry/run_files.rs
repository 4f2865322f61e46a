use configs::location::{local_path, redact};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Longest time for one upload of a log or image.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// Files of the run folder that grow or are looked at while the run goes on (logs, images), as opposed to checkpoints.
///
/// In a local run folder they are written in place. Object stores cannot append, so for those the files grow in a
/// temporary folder and [`RunFiles::sync`] uploads what has changed.
pub struct RunFiles {
    folder: PathBuf,
    remote: Option<Remote>,
}

struct Remote {
    _spool: tempfile::TempDir,
    store: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    runtime: tokio::runtime::Runtime,
    url: String,
    /// Name and length at the last upload.
    uploaded: Vec<(String, u64)>,
}

/// A file of the run folder cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}; check that the run folder is writable")]
pub struct RunFilesError {
    place: String,
    reason: String,
}

fn failed(place: impl AsRef<Path>, reason: impl ToString) -> RunFilesError {
    RunFilesError { place: place.as_ref().display().to_string(), reason: reason.to_string() }
}

impl RunFilesError {
    pub(super) fn of(name: &str, reason: impl ToString) -> Self {
        failed(name, reason)
    }
}

impl RunFiles {
    /// The files of the run folder at `url`; `continued` names those that are appended to.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn open(url: &str, continued: &[&str]) -> Result<Self, RunFilesError> {
        if let Some(folder) = local_path(url) {
            fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
            return Ok(Self { folder, remote: None });
        }
        let shown = redact(url);
        let refused = |error: &dyn std::fmt::Display| failed(&shown, error);
        let parsed = url::Url::parse(url).map_err(|error| refused(&error))?;
        let (store, prefix) = stores::open(&parsed, stores::Bounds::default()).map_err(|error| refused(&error))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| refused(&error))?;
        let spool = tempfile::tempdir().map_err(|error| refused(&error))?;
        let folder = spool.path().to_owned();
        let remote = Remote { _spool: spool, store, prefix, runtime, url: shown, uploaded: Vec::new() };
        for name in continued {
            let earlier = remote.runtime.block_on(async {
                match remote.store.get(&remote.path(name)).await {
                    Ok(found) => found.bytes().await.map(Some),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            });
            let path = folder.join(name);
            if let Some(bytes) = earlier.map_err(|error| failed(&remote.url, error))? {
                fs::write(&path, bytes).map_err(|error| failed(&path, error))?;
            }
        }
        Ok(Self { folder, remote: Some(remote) })
    }

    /// Opens `name` (with `/` between folders) for appending.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn append(&self, name: &str) -> Result<File, RunFilesError> {
        let path = self.local(name)?;
        OpenOptions::new().create(true).append(true).open(&path).map_err(|error| failed(&path, error))
    }

    /// Whether `name` is empty or its last byte ends a line.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn ends_with_newline(&self, name: &str) -> Result<bool, RunFilesError> {
        let path = self.local(name)?;
        let last_byte = || {
            let mut file = File::open(&path)?;
            if file.seek(SeekFrom::End(0))? == 0 {
                return Ok(b'\n');
            }
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last).map(|()| last[0])
        };
        Ok(last_byte().map_err(|error: std::io::Error| failed(&path, error))? == b'\n')
    }

    /// Writes `name` as a whole and gives its place.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<String, RunFilesError> {
        let path = self.local(name)?;
        fs::write(&path, bytes).map_err(|error| failed(&path, error))?;
        Ok(match &self.remote {
            Some(remote) => format!("{}/{name}", remote.url.trim_end_matches('/')),
            None => path.display().to_string(),
        })
    }

    /// Uploads what has grown since the last time; nothing to do in a local run folder.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn sync(&mut self) -> Result<(), RunFilesError> {
        let Some(remote) = &mut self.remote else { return Ok(()) };
        let mut files = Vec::new();
        list(&self.folder, "", &mut files).map_err(|error| failed(&self.folder, error))?;
        for (name, length) in files {
            let known = remote.uploaded.iter().position(|(uploaded, _)| *uploaded == name);
            if known.is_some_and(|i| remote.uploaded[i].1 == length) {
                continue;
            }
            let bytes = fs::read(self.folder.join(&name)).map_err(|error| failed(&self.folder, error))?;
            let path = remote.path(&name);
            let put = remote.store.put(&path, PutPayload::from(bytes));
            let put = async { tokio::time::timeout(UPLOAD_TIMEOUT, put).await };
            let put = remote.runtime.block_on(put).map_err(|_| failed(&remote.url, "an upload took too long"))?;
            put.map_err(|error| failed(&remote.url, error))?;
            match known {
                Some(i) => remote.uploaded[i].1 = length,
                None => remote.uploaded.push((name, length)),
            }
        }
        Ok(())
    }

    fn local(&self, name: &str) -> Result<PathBuf, RunFilesError> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        }
        Ok(path)
    }
}

impl Remote {
    fn path(&self, name: &str) -> ObjectPath {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

fn list(folder: &Path, prefix: &str, files: &mut Vec<(String, u64)>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.push((name, entry.metadata()?.len()));
        }
    }
    Ok(())
}
