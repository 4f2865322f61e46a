//! Open files of a data set: few at a time, and always the ones whose footers were read.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::source::LocalFile;

/// Files that are open at the same time.
const MOST_OPEN: usize = 64;

/// The files, opened when they are needed.
pub(super) struct Handles {
    files: Vec<LocalFile>,
    open: Mutex<Open>,
}

/// The open ones, each with when it was last used.
#[derive(Default)]
struct Open {
    files: HashMap<usize, (Arc<File>, u64)>,
    uses: u64,
}

impl Handles {
    /// Of files as they were found.
    pub fn new(files: Vec<LocalFile>) -> Self {
        Self { files, open: Mutex::default() }
    }

    /// File number `index`.
    ///
    /// # Errors
    /// If it cannot be opened, or another one is there now.
    pub fn get(&self, index: usize) -> io::Result<Arc<File>> {
        // Plain data that is valid between statements.
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.uses += 1;
        let now = open.uses;
        if let Some((file, used)) = open.files.get_mut(&index) {
            *used = now;
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(&self.files[index].path)?);
        unchanged(&self.files[index], &file)?;
        if open.files.len() >= MOST_OPEN {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(index, _)| *index);
            oldest.map(|oldest| open.files.remove(&oldest));
        }
        open.files.insert(index, (file.clone(), now));
        Ok(file)
    }

    /// Whether file number `index` is still as it was found.
    ///
    /// # Errors
    /// If it is not.
    pub fn check(&self, index: usize) -> io::Result<()> {
        unchanged(&self.files[index], &*self.get(index)?)
    }
}

fn unchanged(found: &LocalFile, file: &File) -> io::Result<()> {
    let now = file.metadata()?;
    if now.len() == found.bytes && now.modified()? == found.modified {
        return Ok(());
    }
    let (bytes, then) = (now.len(), found.bytes);
    Err(io::Error::other(format!(
        "the file has changed since the data set was opened ({bytes} bytes now, {then} then)"
    )))
}
