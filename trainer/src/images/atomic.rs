//! Files that appear complete or not at all.

use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file written under a temporary name beside its own and renamed by [`Self::commit`]; dropped before that, it is removed.
pub struct AtomicFile {
    path: PathBuf,
    temp: PathBuf,
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// Creates the temporary file; the folder is made if it does not exist.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(path: &Path) -> std::io::Result<Self> {
        let name =
            path.file_name().ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a file name"))?;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let temp = path.with_file_name(format!(".{}.tmp-{}", name.to_string_lossy(), std::process::id()));
        let file = Some(BufWriter::with_capacity(1 << 20, File::create(&temp)?));
        Ok(Self { path: path.into(), temp, file })
    }

    /// Flushes, syncs and renames.
    ///
    /// # Errors
    /// Those of the file system; the temporary file is then removed.
    pub fn commit(mut self) -> std::io::Result<()> {
        if let Some(writer) = self.file.take() {
            let file = writer.into_inner().map_err(std::io::IntoInnerError::into_error);
            let renamed = file.and_then(|file| file.sync_all()).and_then(|()| std::fs::rename(&self.temp, &self.path));
            if renamed.is_err() {
                // The rename's own error is the one to report.
                let _ = std::fs::remove_file(&self.temp);
            }
            renamed?;
        }
        Ok(())
    }

    fn writer(&mut self) -> std::io::Result<&mut BufWriter<File>> {
        self.file.as_mut().ok_or_else(|| std::io::Error::other("file already committed"))
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.writer()?.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.writer()?.flush()
    }
}

impl Seek for AtomicFile {
    fn seek(&mut self, position: SeekFrom) -> std::io::Result<u64> {
        self.writer()?.seek(position)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if self.file.take().is_some() {
            let _ = std::fs::remove_file(&self.temp);
        }
    }
}
