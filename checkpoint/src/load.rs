//! Verified reads straight to where the values belong: a load waits for memory and digests, so bytes of a local file are
//! copied once and hashed while they are still in the processor's cache.

use crate::{
    backend::{Backend, ChunkRef},
    error::CheckpointError,
    local::Buffers,
};
use futures::{StreamExt, TryStreamExt};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path, sync::Arc};

/// Chunks read and hashed at a time.
const IN_FLIGHT: usize = 8;
/// Bytes read before they are hashed: they stay in a core's own cache.
const BLOCK_BYTES: usize = 512 << 10;

/// Memory that a read fills. It is owned, so that a read that never ends (a network disk that is gone) can be left behind.
pub trait Target: Sized + Send + 'static {
    /// Takes its first `numel` elements off.
    fn split_to(&mut self, numel: usize) -> Self;
    /// Where the elements go.
    fn values_mut(&mut self) -> &mut [f32];
}

/// Wants nothing but the digest.
pub(crate) enum Nothing {}

impl Target for Nothing {
    fn split_to(&mut self, _: usize) -> Self {
        match *self {}
    }

    fn values_mut(&mut self) -> &mut [f32] {
        match *self {}
    }
}

/// What is wanted of a chunk: ranges of its bytes, ascending, and where they go.
pub(crate) struct Job<T> {
    pub chunk: ChunkRef,
    pub wanted: Vec<(Range<usize>, T)>,
}

/// Does all jobs, several at a time. What the targets hold after an error is unspecified.
pub(crate) async fn load<T: Target>(
    backend: &Arc<Backend>,
    jobs: impl IntoIterator<Item = Job<T>>,
) -> Result<(), CheckpointError> {
    let tasks = jobs.into_iter().map(|job| {
        let task = tokio::spawn(job.done(Arc::clone(backend)));
        async move { task.await.unwrap_or_else(|e| Err(CheckpointError::Runtime { reason: e.to_string() })) }
    });
    futures::stream::iter(tasks).buffer_unordered(IN_FLIGHT).try_collect().await
}

impl<T: Target> Job<T> {
    async fn done(mut self, backend: Arc<Backend>) -> Result<(), CheckpointError> {
        if let Some(folder) = &backend.folder {
            let path = folder.join(&self.chunk.key);
            let deadline = backend.deadline(self.chunk.bytes() as u64);
            let key = self.chunk.key.clone();
            let read = tokio::task::spawn_blocking(move || (self.is_read_in_place(&path), self));
            let read = async { Ok(read.await) };
            match backend.bounded("read", &key, deadline, read).await? {
                Ok((Ok(true), _)) => return Ok(()),
                // Whatever it is: the way below tries again and knows how to say it.
                Ok((_, job)) => self = job,
                Err(e) => return Err(CheckpointError::Runtime { reason: e.to_string() }),
            }
        }
        let bytes = backend.get_chunk(&self.chunk, &Buffers::default()).await?;
        for (range, target) in &mut self.wanted {
            bytemuck::cast_slice_mut(target.values_mut()).copy_from_slice(&bytes[range.clone()]);
        }
        Ok(())
    }

    /// Reads a chunk of a file in one pass and tells whether it is as it was written.
    fn is_read_in_place(&mut self, path: &Path) -> io::Result<bool> {
        let file = File::open(path)?;
        if file.metadata()?.len() != self.chunk.object_bytes {
            return Ok(false);
        }
        let mut hasher = self.chunk.expected.hasher();
        let mut at = 0;
        let mut read = |at: usize, out: &mut [u8]| {
            out.chunks_mut(BLOCK_BYTES).enumerate().try_for_each(|(number, block)| {
                file.read_exact_at(block, self.chunk.range.start + (at + number * BLOCK_BYTES) as u64)?;
                hasher.update(block);
                io::Result::Ok(())
            })
        };
        let mut unwanted = Vec::new();
        let mut skip = |range: Range<usize>, read: &mut dyn FnMut(usize, &mut [u8]) -> io::Result<()>| {
            unwanted.resize(range.len().min(BLOCK_BYTES), 0);
            range.clone().step_by(BLOCK_BYTES).try_for_each(|at| {
                let length = (range.end - at).min(BLOCK_BYTES);
                read(at, &mut unwanted[..length])
            })
        };
        for (range, target) in &mut self.wanted {
            // The same bytes for two targets.
            if range.start < at {
                return Ok(false);
            }
            skip(at..range.start, &mut read)?;
            read(range.start, bytemuck::cast_slice_mut(target.values_mut()))?;
            at = range.end;
        }
        skip(at..self.chunk.bytes(), &mut read)?;
        Ok(hasher.finish() == self.chunk.expected)
    }
}
