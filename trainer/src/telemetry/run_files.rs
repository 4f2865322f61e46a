use super::uploads::Uploads;
use configs::location::{local_path, redact};
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Files of the run folder that grow or are looked at while the run goes on (logs, images), as opposed to checkpoints.
///
/// In a local run folder they are written in place. Object stores cannot append, so for those the files grow in a
/// temporary folder, and a thread uploads what has changed after [`RunFiles::sync`].
pub struct RunFiles {
    folder: PathBuf,
    /// Before the folder that it uploads goes away, it has its end.
    uploads: Option<Uploads>,
    url: String,
    _spool: Option<tempfile::TempDir>,
}

/// A file of the run folder cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {reason}; check that the run folder is writable")]
pub struct RunFilesError {
    place: String,
    reason: String,
}

pub(super) fn failed(place: impl AsRef<Path>, reason: impl ToString) -> RunFilesError {
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
        let shown = redact(url);
        if let Some(folder) = local_path(url) {
            fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
            return Ok(Self { folder, uploads: None, url: shown, _spool: None });
        }
        let spool = tempfile::tempdir().map_err(|error| failed(&shown, error))?;
        let folder = spool.path().to_owned();
        let uploads = Uploads::start(url, &folder, continued)?;
        Ok(Self { folder, uploads: Some(uploads), url: shown, _spool: Some(spool) })
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
        Ok(match &self.uploads {
            Some(_) => format!("{}/{name}", self.url.trim_end_matches('/')),
            None => path.display().to_string(),
        })
    }

    /// Lets what has grown be uploaded, beside whatever comes next; nothing to do in a local run folder.
    pub fn sync(&self) {
        if let Some(uploads) = &self.uploads {
            uploads.ask();
        }
    }

    fn local(&self, name: &str) -> Result<PathBuf, RunFilesError> {
        let path = self.folder.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
        }
        Ok(path)
    }
}
