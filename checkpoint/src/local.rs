//! Reads of local files into buffers that are used again: fresh memory costs more than the read itself.

use bytes::Bytes;
use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Buffers for the reads of one request; they go when it ends and the last of its bytes is let go.
#[derive(Debug, Clone, Default)]
pub(crate) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// A buffer that goes back to where it came from.
struct Lent {
    bytes: Vec<u8>,
    to: Buffers,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        self.to.lock().push(bytes);
    }
}

impl Buffers {
    fn lock(&self) -> MutexGuard<'_, Vec<Vec<u8>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is there of the bytes `range` of a file, and its length.
    pub fn read(&self, path: &Path, range: Range<u64>) -> io::Result<(Bytes, u64)> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let wanted = range.end.min(size).saturating_sub(range.start) as usize;
        let mut bytes = self.lock().pop().unwrap_or_default();
        bytes.resize(wanted, 0);
        file.read_exact_at(&mut bytes, range.start)?;
        Ok((Bytes::from_owner(Lent { bytes, to: self.clone() }), size))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_there_is_read_and_memory_is_used_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let buffers = Buffers::default();
        let (first, size) = buffers.read(&path, 2..6).unwrap();
        assert_eq!((&first[..], size), (&b"2345"[..], 10));
        let place = first.as_ptr();
        drop(first.slice(1..));
        assert_eq!(buffers.read(&path, 8..20).unwrap().0, &b"89"[..], "held bytes are not overwritten");
        assert_eq!(first, &b"2345"[..]);
        buffers.lock().clear();
        drop(first);
        let (again, _) = buffers.read(&path, 6..9).unwrap();
        assert_eq!((again.as_ptr(), &again[..]), (place, &b"678"[..]));
        assert_eq!(buffers.read(&path, 30..40).unwrap(), (Bytes::new(), 10));
        assert_eq!(buffers.read(&folder.path().join("none"), 0..1).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
