//! The cache's folder: shared by processes, bounded for all of them together, in order after any of them was killed.
//!
//! ```text
//! <dir>/blocks-1/ledger             bytes in use, under a file lock that goes with its process
//! <dir>/blocks-1/ab/abcd….block     blocks
//! <dir>/blocks-1/ab/PID-RANDOM.tmp  blocks on their way
//! ```
//!
//! Space is taken in the ledger before a file exists and given back after it is gone, so a killed process leaves the ledger
//! too high, never too low. Counting the files sets it right: when a process opens the cache, and when the ledger says "full",
//! when the least recently used blocks go too.

use super::block::{BlockKey, FILE_BYTES, header, space_of};
use std::fs::{self, DirBuilder, File, FileTimes, OpenOptions, TryLockError};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A block on its way for so long belongs to a process that was killed.
const LEFTOVER: Duration = Duration::from_secs(600);
/// A block's time of use is written down if the one that is written is older.
const TOUCH_AFTER: Duration = Duration::from_secs(60);
/// Whoever holds the ledger for longer than this is stopped or has a disk that hangs: a block is not kept then.
const PATIENCE: Duration = Duration::from_secs(5);
/// The same when the cache is opened: counting the files of a large one takes a while.
const PATIENCE_TO_OPEN: Duration = Duration::from_secs(60);
/// What a block's folder is called, before the kinds of its files.
const BLOCKS: &str = "blocks-1";
const BLOCK: &str = "block";
const ON_ITS_WAY: &str = "tmp";

#[derive(Debug)]
pub(super) struct Folder {
    blocks: PathBuf,
    /// Most bytes of all files.
    limit: u64,
}

impl Folder {
    /// Makes the folder where it is not there, counts what it holds, and brings it below `limit`.
    pub fn open(dir: &Path, limit: u64) -> io::Result<Self> {
        let blocks = dir.join(BLOCKS);
        // What is cached may be as private as the bucket.
        DirBuilder::new().recursive(true).mode(0o700).create(&blocks)?;
        let folder = Self { blocks, limit };
        let Some(mut ledger) = Ledger::lock(&folder.blocks, PATIENCE_TO_OPEN)? else {
            return Err(io::Error::other("another process has locked it for a minute"));
        };
        let used = folder.make_room(limit)?;
        ledger.write(used)?;
        Ok(folder)
    }

    /// The file's bytes, and notes that it was used; `None` if it is not there.
    pub fn read(&self, key: &BlockKey) -> io::Result<Option<Vec<u8>>> {
        let file = match File::open(key.file(&self.blocks)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut content = Vec::with_capacity(FILE_BYTES as usize);
        // A longer file is none of ours; that it is too long tells.
        (&file).take(FILE_BYTES + 1).read_to_end(&mut content)?;
        let now = SystemTime::now();
        if file.metadata()?.modified()?.elapsed().is_ok_and(|age| age > TOUCH_AFTER) {
            // The order of eviction is all that suffers.
            let _ = file.set_times(FileTimes::new().set_modified(now));
        }
        Ok(Some(content))
    }

    /// Forgets a block whose file is not what it should be.
    pub fn remove(&self, key: &BlockKey) {
        // Its space stays in the ledger until the next count.
        let _ = fs::remove_file(key.file(&self.blocks));
    }

    /// Writes a block. A reader finds it whole or not at all; of several writers any wins.
    pub fn write(&self, key: &BlockKey, data: &[u8]) -> io::Result<()> {
        let file = key.file(&self.blocks);
        if file.exists() {
            return Ok(());
        }
        let header = header(key, data);
        let Some(parent) = file.parent() else { unreachable!("a block lies in a folder") };
        DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        let random = RandomState::new().hash_one(key);
        let temporary = parent.join(format!("{}-{random:016x}.{ON_ITS_WAY}", std::process::id()));
        let Some(mut out) = self.reserve(&temporary, space_of((header.len() + data.len()) as u64))? else {
            return Ok(());
        };
        let written =
            out.write_all(&header).and_then(|()| out.write_all(data)).and_then(|()| fs::rename(&temporary, file));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Takes space in the ledger, making room if need be, and creates the file that it is for; `None` if there is none to take.
    fn reserve(&self, temporary: &Path, bytes: u64) -> io::Result<Option<File>> {
        let Some(mut ledger) = Ledger::lock(&self.blocks, PATIENCE)? else { return Ok(None) };
        let used = match ledger.read()? {
            Some(used) if used.saturating_add(bytes) <= self.limit => used,
            // Some more than is needed now, so that not every block has to count all files.
            _ => self.make_room((self.limit - self.limit / 16).saturating_sub(bytes))?,
        };
        if used + bytes > self.limit {
            ledger.write(used)?;
            return Ok(None);
        }
        ledger.write(used + bytes)?;
        OpenOptions::new().write(true).create_new(true).open(temporary).map(Some)
    }

    /// Counts all files and removes those least recently used until at most `most` bytes are left; gives what is left.
    /// The ledger is locked, so no file is begun meanwhile; those that are on their way count in full.
    fn make_room(&self, most: u64) -> io::Result<u64> {
        let now = SystemTime::now();
        let (mut used, mut blocks) = (0, Vec::new());
        for folder in entries(&self.blocks)?.into_iter().filter(|path| path.is_dir()) {
            for path in entries(&folder)? {
                let kind = path.extension().and_then(|kind| kind.to_str());
                // Files that vanish under our hands were somebody's to remove.
                let Ok(meta) = fs::metadata(&path) else { continue };
                let modified = meta.modified()?;
                match kind {
                    Some(BLOCK) => {
                        used += space_of(meta.len());
                        blocks.push((modified, space_of(meta.len()), path));
                    }
                    Some(ON_ITS_WAY) => {
                        let age = now.duration_since(modified).unwrap_or_else(|ahead| ahead.duration());
                        if age <= LEFTOVER || !removed(&path) {
                            used += FILE_BYTES;
                        }
                    }
                    // Not ours.
                    _ => {}
                }
            }
        }
        blocks.sort_unstable();
        for (_, bytes, path) in blocks {
            if used <= most {
                break;
            }
            if removed(&path) {
                used -= bytes;
            }
        }
        Ok(used)
    }
}

/// Whether the file is gone.
fn removed(path: &Path) -> bool {
    match fs::remove_file(path) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

fn entries(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// The locked ledger: bytes in use and their complement, both little-endian.
struct Ledger(File);

impl Ledger {
    /// `None` if it stays locked.
    fn lock(blocks: &Path, patience: Duration) -> io::Result<Option<Self>> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(blocks.join("ledger"))?;
        let until = Instant::now() + patience;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(Self(file))),
                Err(TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }

    /// `None` if it was not written to its end.
    fn read(&mut self) -> io::Result<Option<u64>> {
        let mut content = Vec::new();
        self.0.rewind()?;
        (&self.0).take(17).read_to_end(&mut content)?;
        let Ok(content) = <[u8; 16]>::try_from(content) else { return Ok(None) };
        let number = u128::from_le_bytes(content);
        let (used, complement) = (number as u64, (number >> 64) as u64);
        Ok((used == !complement).then_some(used))
    }

    fn write(&mut self, used: u64) -> io::Result<()> {
        let number = u128::from(used) | u128::from(!used) << 64;
        self.0.rewind()?;
        self.0.write_all(&number.to_le_bytes())
    }
}

#[cfg(test)]
mod tests;
