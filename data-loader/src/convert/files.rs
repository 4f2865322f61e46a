//! The files that are converted: in a local folder or an object store, listed by name and read by ranges.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use configs::location::{local_path, redact, resolve};
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use url::Url;

use crate::DataError;
use crate::read::Io;

/// Bytes that a [`SeekReader`] fetches at a time.
const READ_AHEAD_BYTES: u64 = 256 << 10;

/// A store in which there are files.
pub(super) struct Remote {
    pub store: Arc<dyn ObjectStore>,
    pub io: Io,
    /// What goes in front of a path to name a file.
    prefix: String,
}

/// A file or a folder, which need not exist.
#[derive(Clone)]
pub(super) enum Place {
    Local(PathBuf),
    Remote(Arc<Remote>, Path),
}

/// What is directly in a folder, sorted.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub files: Vec<String>,
    pub folders: Vec<String>,
}

impl Place {
    /// Of a path or URL; no request is made.
    ///
    /// # Errors
    /// If it is neither.
    pub fn parse(text: &str) -> Result<Self, DataError> {
        let url_text = resolve(FsPath::new(""), text);
        if let Some(path) = local_path(&url_text) {
            return Ok(Self::Local(path));
        }
        let refuse = |reason: String| DataError::Location { url: redact(&url_text), reason };
        let url = Url::parse(&url_text).map_err(|error| refuse(error.to_string()))?;
        let (store, path) = stores::open(&url, stores::Bounds::default()).map_err(|error| refuse(error.to_string()))?;
        let prefix = redact(&format!("{}/", &url[..url::Position::BeforePath]));
        Self::in_store(store, path, prefix)
    }

    /// In a store that is made already; `prefix` stands before the names of its files.
    ///
    /// # Errors
    /// If the thread for requests cannot be started.
    pub fn in_store(store: Arc<dyn ObjectStore>, path: Path, prefix: String) -> Result<Self, DataError> {
        Ok(Self::Remote(Arc::new(Remote { store, io: Io::new(&prefix)?, prefix }), path))
    }

    /// The path, or the URL without secrets.
    pub fn name(&self) -> String {
        match self {
            Self::Local(path) => path.display().to_string(),
            Self::Remote(remote, path) => format!("{}{path}", remote.prefix),
        }
    }

    /// The last part of the name.
    pub fn file_name(&self) -> String {
        match self {
            Self::Local(path) => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            Self::Remote(_, path) => path.filename().unwrap_or_default().to_owned(),
        }
    }

    /// What is called `name`, or `folder/name`, below this folder.
    pub fn join(&self, name: &str) -> Self {
        match self {
            Self::Local(path) => Self::Local(path.join(name)),
            Self::Remote(remote, path) => {
                Self::Remote(remote.clone(), name.split('/').fold(path.clone(), |path, part| path.join(part)))
            }
        }
    }

    /// The folder that this is in.
    pub fn parent(&self) -> Self {
        match self {
            Self::Local(path) => Self::Local(path.parent().unwrap_or(FsPath::new("/")).to_owned()),
            Self::Remote(remote, path) => {
                let parts: Vec<_> = path.parts().collect();
                Self::Remote(remote.clone(), parts[..parts.len().saturating_sub(1)].iter().cloned().collect())
            }
        }
    }

    fn failed(&self, reason: impl ToString) -> DataError {
        DataError::source(self.name(), format!("cannot be read: {}", reason.to_string()))
    }

    /// Whether a file is here.
    ///
    /// # Errors
    /// If the store does not answer.
    pub fn is_file(&self) -> Result<bool, DataError> {
        match self {
            Self::Local(path) => match std::fs::metadata(path) {
                Ok(about) => Ok(about.is_file()),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
                Err(error) => Err(self.failed(error)),
            },
            Self::Remote(_, path) if path.as_ref().is_empty() => Ok(false),
            Self::Remote(remote, path) => match remote.io.block_on(remote.store.head(path)) {
                Ok(_) => Ok(true),
                Err(object_store::Error::NotFound { .. }) => Ok(false),
                Err(error) => Err(self.failed(error)),
            },
        }
    }

    /// What is in this folder.
    ///
    /// # Errors
    /// If it cannot be listed.
    pub fn list(&self) -> Result<Listing, DataError> {
        let mut listing = Listing::default();
        match self {
            Self::Local(path) => {
                for entry in std::fs::read_dir(path).map_err(|error| self.failed(error))? {
                    let entry = entry.map_err(|error| self.failed(error))?;
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let kind = entry.file_type().map_err(|error| self.failed(error))?;
                    // Links are followed.
                    let is_folder = if kind.is_symlink() { path.join(&name).is_dir() } else { kind.is_dir() };
                    if is_folder { &mut listing.folders } else { &mut listing.files }.push(name);
                }
            }
            Self::Remote(remote, path) => {
                let listed = remote.io.block_on(remote.store.list_with_delimiter(Some(path)));
                let listed = listed.map_err(|error| self.failed(error))?;
                let name = |path: &Path| path.filename().unwrap_or_default().to_owned();
                listing.files.extend(listed.objects.iter().map(|object| name(&object.location)));
                listing.folders.extend(listed.common_prefixes.iter().map(name));
            }
        }
        listing.files.sort_unstable();
        listing.folders.sort_unstable();
        Ok(listing)
    }

    /// Length of this file.
    ///
    /// # Errors
    /// If it is not there.
    pub fn bytes(&self) -> Result<u64, DataError> {
        match self {
            Self::Local(path) => Ok(std::fs::metadata(path).map_err(|error| self.failed(error))?.len()),
            Self::Remote(remote, path) => {
                Ok(remote.io.block_on(remote.store.head(path)).map_err(|error| self.failed(error))?.size)
            }
        }
    }

    /// This file, if it has at most `most_bytes`.
    ///
    /// # Errors
    /// If it cannot be read, or has more.
    pub fn read(&self, most_bytes: u64) -> Result<Vec<u8>, DataError> {
        let too_long = |bytes: u64| self.failed(format!("it has {bytes} bytes; expected at most {most_bytes}"));
        match self {
            Self::Local(path) => {
                let file = File::open(path).map_err(|error| self.failed(error))?;
                let bytes = file.metadata().map_err(|error| self.failed(error))?.len();
                if bytes > most_bytes {
                    return Err(too_long(bytes));
                }
                let mut read = Vec::with_capacity(bytes as usize);
                file.take(most_bytes).read_to_end(&mut read).map_err(|error| self.failed(error))?;
                Ok(read)
            }
            Self::Remote(remote, path) => {
                let read = async {
                    let found = remote.store.get(path).await?;
                    let bytes = found.meta.size;
                    if bytes > most_bytes { Ok(Err(bytes)) } else { found.bytes().await.map(Ok) }
                };
                let read = remote.io.block_on(read).map_err(|error: object_store::Error| self.failed(error))?;
                Ok(read.map_err(too_long)?.into())
            }
        }
    }

    /// Stretches of this file.
    ///
    /// # Errors
    /// If one cannot be read whole.
    pub fn read_ranges(&self, ranges: &[Range<u64>]) -> Result<Vec<Bytes>, DataError> {
        match self {
            Self::Local(path) => {
                let file = File::open(path).map_err(|error| self.failed(error))?;
                let read = |range: &Range<u64>| {
                    let mut bytes = vec![0; (range.end - range.start) as usize];
                    file.read_exact_at(&mut bytes, range.start).map(|()| Bytes::from(bytes)).map_err(|error| {
                        self.failed(match error.kind() {
                            std::io::ErrorKind::UnexpectedEof => {
                                format!("it is cut short: bytes {} to {} are not there", range.start, range.end)
                            }
                            _ => error.to_string(),
                        })
                    })
                };
                ranges.iter().map(read).collect()
            }
            Self::Remote(remote, path) => {
                let read = remote.io.block_on(remote.store.get_ranges(path, ranges));
                let read = read.map_err(|error| self.failed(error))?;
                let short =
                    read.iter().zip(ranges).find(|(bytes, range)| bytes.len() as u64 != range.end - range.start);
                if let Some((bytes, range)) = short {
                    return Err(self.failed(format!("{} bytes came of the range {range:?}", bytes.len())));
                }
                Ok(read)
            }
        }
    }

    /// One stretch of this file.
    ///
    /// # Errors
    /// If it cannot be read whole.
    pub fn read_range(&self, range: Range<u64>) -> Result<Bytes, DataError> {
        Ok(self.read_ranges(std::slice::from_ref(&range))?.remove(0))
    }
}

/// A file for readers that go through it from the beginning, with seeking.
pub(super) struct SeekReader {
    place: Place,
    /// Length of the file.
    pub file_bytes: u64,
    at: u64,
    buffer: Bytes,
    /// Where the buffer begins in the file.
    buffer_start: u64,
}

impl SeekReader {
    /// # Errors
    /// If the file is not there.
    pub fn open(place: &Place) -> Result<Self, DataError> {
        let file_bytes = place.bytes()?;
        Ok(Self { place: place.clone(), file_bytes, at: 0, buffer: Bytes::new(), buffer_start: 0 })
    }
}

impl Read for SeekReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.at >= self.file_bytes {
            return Ok(0);
        }
        let in_buffer = self.at.checked_sub(self.buffer_start).filter(|&at| at < self.buffer.len() as u64);
        let at = match in_buffer {
            Some(at) => at as usize,
            None => {
                let end = self.file_bytes.min(self.at + READ_AHEAD_BYTES);
                self.buffer = self.place.read_range(self.at..end).map_err(std::io::Error::other)?;
                self.buffer_start = self.at;
                0
            }
        };
        let count = out.len().min(self.buffer.len() - at);
        out[..count].copy_from_slice(&self.buffer[at..at + count]);
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for SeekReader {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.file_bytes.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| std::io::Error::other("a seek to before the beginning"))?;
        Ok(self.at)
    }
}
