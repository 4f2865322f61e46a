//! Verified reads straight to where the values belong: a load waits for memory and digests, so bytes of a local file are
//! copied once and hashed while they are still in the processor's cache.

use crate::{
    backend::{Backend, ChunkRef},
    error::CheckpointError,
    local::Buffers,
};
use futures::{StreamExt, TryStreamExt};
use std::{fs::File, io, ops::Range, os::unix::fs::FileExt, path::Path, sync::Arc};

/// Chunks of a remote object in flight.
const IN_FLIGHT: usize = 8;
/// Chunks of a file that one thread reads one after the other: the kernel reads ahead of it, and the runtime is seldom asked.
const RUN: usize = 4;
/// Threads that read files, at most. A few more than there are cores, so that some hash while others wait for the disk.
const READERS: usize = 8;
/// Bytes read before they are hashed: they stay in a core's own cache.
const BLOCK_BYTES: usize = 256 << 10;

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

/// Does all jobs, which come in the order of the bytes, several at a time. What the targets hold after an error is unspecified.
pub(crate) async fn load<T: Target>(backend: &Arc<Backend>, jobs: Vec<Job<T>>) -> Result<(), CheckpointError> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (longest, in_flight) = match backend.folder {
        Some(_) => (RUN, READERS.min(cores + 2)),
        None => (1, IN_FLIGHT),
    };
    let mut runs: Vec<Vec<Job<T>>> = Vec::new();
    for job in jobs {
        match runs.last_mut() {
            Some(run) if run.len() < longest && run[0].chunk.key == job.chunk.key => run.push(job),
            _ => runs.push(vec![job]),
        }
    }
    let tasks = runs.into_iter().map(|run| {
        let task = tokio::spawn(done(Arc::clone(backend), run));
        async move { task.await.unwrap_or_else(|e| Err(CheckpointError::Runtime { reason: e.to_string() })) }
    });
    futures::stream::iter(tasks).buffer_unordered(in_flight).try_collect().await
}

/// Does jobs of one object.
async fn done<T: Target>(backend: Arc<Backend>, mut run: Vec<Job<T>>) -> Result<(), CheckpointError> {
    if let (Some(folder), Some(first)) = (&backend.folder, run.first()) {
        let key = first.chunk.key.clone();
        let deadline = backend.deadline(run.iter().map(|job| job.chunk.bytes() as u64).sum());
        let path = folder.join(&key);
        let read = tokio::task::spawn_blocking(move || read_in_place(&path, run));
        let left = backend.bounded("read", &key, deadline, async { Ok(read.await) }).await?;
        run = left.map_err(|e| CheckpointError::Runtime { reason: e.to_string() })?;
    }
    for Job { chunk, wanted } in run {
        let bytes = backend.get_chunk(&chunk, &Buffers::default()).await?;
        for (range, mut target) in wanted {
            bytemuck::cast_slice_mut(target.values_mut()).copy_from_slice(&bytes[range]);
        }
    }
    Ok(())
}

/// Does jobs of a file and gives back those that failed, for whatever reason: the other way tries again and knows how to say it.
fn read_in_place<T: Target>(path: &Path, mut run: Vec<Job<T>>) -> Vec<Job<T>> {
    let Ok(file) = File::open(path) else { return run };
    run.retain_mut(|job| !job.is_read_in_place(&file).unwrap_or(false));
    run
}

impl<T: Target> Job<T> {
    /// Reads a chunk of a file in one pass and tells whether it is as it was written.
    fn is_read_in_place(&mut self, file: &File) -> io::Result<bool> {
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
