//! Verified reads. Only the chunks that a request touches are read, and each is checked before a byte of it is used.

use crate::{
    backend::{Backend, ChunkRef},
    error::CheckpointError,
    load::{Job, Nothing, Target, load},
    local::Buffers,
    manifest::{Dtype, Manifest, TensorEntry},
    runtime,
    store::RunStore,
};
use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt};
use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

/// Chunks read and hashed at a time.
const IN_FLIGHT: usize = 8;
/// Verified chunks that a reader keeps: small tensors are neighbours in a chunk and are often read one by one.
const CACHED: usize = 8;

/// A chunk's place: index of the shard in the manifest, index of the chunk in the shard.
type ChunkId = (usize, usize);

/// Reads tensors of one checkpoint by element ranges, whoever wrote them. May be shared by threads.
#[derive(Debug)]
pub struct CheckpointReader {
    backend: Arc<Backend>,
    manifest: Arc<Manifest>,
    /// Why the manifest must not be followed: it may have come from elsewhere than this store.
    unsound: Option<CheckpointError>,
    cache: Mutex<VecDeque<(ChunkId, Bytes)>>,
}

/// One piece of a read: elements of a tensor from `start_numel` on go to `out`, as many as it has.
#[derive(Debug)]
pub struct ReadInto<'a, T> {
    /// Name with its section.
    pub name: &'a str,
    /// First element.
    pub start_numel: usize,
    /// Where they go.
    pub out: T,
}

/// Bytes of a chunk that a request wants.
struct Piece {
    chunk: ChunkId,
    in_chunk: Range<usize>,
    /// Where they go in the request's own bytes.
    at_bytes: usize,
}

impl RunStore {
    /// A reader of a checkpoint. Reads nothing yet.
    pub fn read(&self, manifest: &Manifest) -> CheckpointReader {
        CheckpointReader {
            backend: Arc::clone(&self.backend),
            manifest: Arc::new(manifest.clone()),
            unsound: check(&self.backend, manifest).err(),
            cache: Mutex::default(),
        }
    }

    /// Reads every shard of a checkpoint and compares it with the manifest.
    ///
    /// # Errors
    /// [`CheckpointError::Missing`] or [`CheckpointError::Damaged`] for the first shard that is not as it was written; store errors.
    pub fn verify(&self, manifest: &Manifest) -> Result<(), CheckpointError> {
        runtime::wait(verify(&self.backend, manifest))
    }
}

impl CheckpointReader {
    /// The checkpoint's manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The tensors' names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.manifest.tensors.keys().map(String::as_str)
    }

    /// Shape of the whole tensor, however it is cut.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.manifest.tensors.get(name).map(|tensor| tensor.shape.as_slice())
    }

    /// Element type of a tensor.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.manifest.tensors.get(name).map(|tensor| tensor.dtype)
    }

    /// Elements `range` of tensor `name`, in row-major order.
    ///
    /// # Errors
    /// [`CheckpointError::BadRead`] (no such tensor, not f32, beyond its end); [`CheckpointError::Damaged`] and
    /// [`CheckpointError::Missing`] name the shard; store errors.
    pub fn read_f32(&self, name: &str, range: Range<usize>) -> Result<Vec<f32>, CheckpointError> {
        let tensor = self.tensor(name, Some(Dtype::F32), &range)?;
        let mut out = self.allocate(name, range.len())?;
        let to = bytemuck::cast_slice_mut(&mut out);
        self.fetch(self.plan(tensor, range), |at_bytes, bytes| to[at_bytes..][..bytes.len()].copy_from_slice(bytes))?;
        Ok(out)
    }

    /// All elements of tensor `name`, in row-major order.
    ///
    /// # Errors
    /// As [`CheckpointReader::read_f32`].
    pub fn read_all_f32(&self, name: &str) -> Result<Vec<f32>, CheckpointError> {
        let numel = self.manifest.tensors.get(name).map_or(0, TensorEntry::numel);
        self.read_f32(name, 0..numel)
    }

    /// Many pieces in one go: every chunk is read once, several at a time. The way to load a rank's share.
    ///
    /// # Errors
    /// As [`CheckpointReader::read_f32`]; what the targets hold is then unspecified.
    pub fn read_into<T: Target>(&self, requests: Vec<ReadInto<'_, T>>) -> Result<(), CheckpointError> {
        let mut by_chunk: BTreeMap<ChunkId, Vec<(Range<usize>, T)>> = BTreeMap::new();
        for ReadInto { name, start_numel, mut out } in requests {
            let range = start_numel..start_numel.saturating_add(out.values_mut().len());
            let tensor = self.tensor(name, Some(Dtype::F32), &range)?;
            for Piece { chunk, in_chunk, .. } in self.plan(tensor, range) {
                let target = out.split_to(in_chunk.len() / Dtype::F32.element_bytes());
                by_chunk.entry(chunk).or_default().push((in_chunk, target));
            }
        }
        let jobs = by_chunk.into_iter().map(|(chunk, mut wanted)| {
            wanted.sort_by_key(|(range, _)| range.start);
            Job { chunk: chunk_ref(&self.manifest, chunk), wanted }
        });
        runtime::wait(load(&self.backend, jobs.collect()))
    }

    /// Verifies a part (number, of how many) of the chunks that hold nothing of the tensors that `is_read` names. When every such
    /// tensor is read by somebody and every part is verified by somebody, the whole checkpoint is verified.
    ///
    /// # Errors
    /// As [`CheckpointReader::read_f32`].
    pub fn verify_others(&self, is_read: impl Fn(&str) -> bool, part: (usize, usize)) -> Result<(), CheckpointError> {
        if let Some(error) = &self.unsound {
            return Err(error.clone());
        }
        let tensors = self.manifest.tensors.iter().filter(|(name, _)| is_read(name));
        let pieces = tensors.flat_map(|(_, tensor)| self.plan(tensor, 0..tensor.numel()));
        let read: HashSet<ChunkId> = pieces.map(|piece| piece.chunk).collect();
        let (number, of) = part;
        let others = all_chunks(&self.manifest).filter(|chunk| !read.contains(chunk));
        let share = others.enumerate().filter(|(index, _)| index % of == number).map(|(_, chunk)| chunk);
        runtime::wait(visit(&self.backend, &self.manifest, share.collect()))
    }

    /// Elements `range` of a tensor of any type, as the bytes in the store.
    pub(crate) fn read_bytes(&self, name: &str, range: Range<usize>) -> Result<Vec<u8>, CheckpointError> {
        let tensor = self.tensor(name, None, &range)?;
        let mut out = self.allocate(name, range.len() * tensor.dtype.element_bytes())?;
        let pieces = self.plan(tensor, range);
        self.fetch(pieces, |at_bytes, bytes| out[at_bytes..][..bytes.len()].copy_from_slice(bytes))?;
        Ok(out)
    }

    fn bad_read(&self, reason: String) -> CheckpointError {
        CheckpointError::BadRead { url: self.backend.url.clone(), step: self.manifest.step, reason }
    }

    fn tensor(&self, name: &str, dtype: Option<Dtype>, range: &Range<usize>) -> Result<&TensorEntry, CheckpointError> {
        if let Some(error) = &self.unsound {
            return Err(error.clone());
        }
        let tensor = self.manifest.tensors.get(name).ok_or_else(|| {
            self.bad_read(format!("there is no tensor `{name}` among its {}", self.manifest.tensors.len()))
        })?;
        if dtype.is_some_and(|dtype| dtype != tensor.dtype) {
            return Err(self.bad_read(format!("tensor `{name}` is {:?}; expected F32", tensor.dtype)));
        }
        if range.start > range.end || range.end > tensor.numel() {
            return Err(self.bad_read(format!("elements {range:?} of tensor `{name}`, which has {}", tensor.numel())));
        }
        Ok(tensor)
    }

    /// Running out of memory is an error, not an abort.
    fn allocate<T: Clone + Default>(&self, name: &str, len: usize) -> Result<Vec<T>, CheckpointError> {
        let mut out = Vec::new();
        out.try_reserve_exact(len)
            .map_err(|e| self.bad_read(format!("no memory for {len} elements of tensor `{name}`: {e}")))?;
        out.resize(len, T::default());
        Ok(out)
    }

    /// Where the elements `range` lie. The manifest was checked: all of this is inside shards, elements never cross chunks.
    fn plan(&self, tensor: &TensorEntry, range: Range<usize>) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let element_bytes = tensor.dtype.element_bytes();
        let chunk_bytes = self.manifest.chunk_bytes;
        let first = tensor.slices.partition_point(|slice| slice.end_numel <= range.start);
        for slice in tensor.slices[first..].iter().take_while(|slice| slice.start_numel < range.end) {
            let (start, end) = (slice.start_numel.max(range.start), slice.end_numel.min(range.end));
            let mut at = slice.offset_bytes + ((start - slice.start_numel) * element_bytes) as u64;
            let stop = slice.offset_bytes + ((end - slice.start_numel) * element_bytes) as u64;
            let mut at_bytes = (start - range.start) * element_bytes;
            while at < stop {
                let index = at / chunk_bytes;
                let piece_end = stop.min((index + 1) * chunk_bytes);
                let in_chunk = (at - index * chunk_bytes) as usize..(piece_end - index * chunk_bytes) as usize;
                let taken = in_chunk.len();
                pieces.push(Piece { chunk: (slice.shard, index as usize), in_chunk, at_bytes });
                at_bytes += taken;
                at = piece_end;
            }
        }
        pieces
    }

    /// Reads the chunks of `pieces`, each once, and hands every piece's bytes to `sink(at_bytes, bytes)`.
    fn fetch(&self, mut pieces: Vec<Piece>, mut sink: impl FnMut(usize, &[u8]) + Send) -> Result<(), CheckpointError> {
        pieces.sort_by_key(|piece| piece.chunk);
        let mut missing = Vec::new();
        let mut found = Vec::new();
        for group in pieces.chunk_by(|a, b| a.chunk == b.chunk) {
            match self.cached(group[0].chunk) {
                Some(bytes) => found.push((group, bytes)),
                None => missing.push(group),
            }
        }
        let mut deliver = |group: &[Piece], bytes: &Bytes| {
            group.iter().for_each(|piece| sink(piece.at_bytes, &bytes[piece.in_chunk.clone()]));
        };
        found.iter().for_each(|(group, bytes)| deliver(group, bytes));
        if missing.is_empty() {
            return Ok(());
        }
        let wanted: Vec<ChunkId> = missing.iter().map(|group| group[0].chunk).collect();
        runtime::wait(async {
            let mut chunks = std::pin::pin!(chunks(&self.backend, &self.manifest, wanted));
            for group in missing {
                let Some(bytes) = chunks.try_next().await? else {
                    break;
                };
                deliver(group, &bytes);
                self.keep(group[0].chunk, bytes);
            }
            Ok(())
        })
    }

    fn cached(&self, id: ChunkId) -> Option<Bytes> {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.iter().find(|(known, _)| *known == id).map(|(_, bytes)| bytes.clone())
    }

    fn keep(&self, id: ChunkId, bytes: Bytes) {
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        cache.truncate(CACHED - 1);
        cache.push_front((id, bytes));
    }
}

/// Verified chunks in the order of `wanted`, several in flight on the runtime's threads.
fn chunks(
    backend: &Arc<Backend>,
    manifest: &Manifest,
    wanted: Vec<ChunkId>,
) -> impl Stream<Item = Result<Bytes, CheckpointError>> + Send {
    let wanted: Vec<ChunkRef> = wanted.into_iter().map(|chunk| chunk_ref(manifest, chunk)).collect();
    let backend = Arc::clone(backend);
    let buffers = Buffers::default();
    futures::stream::iter(wanted)
        .map(move |chunk| {
            let (backend, buffers) = (Arc::clone(&backend), buffers.clone());
            let task = tokio::spawn(async move { backend.get_chunk(&chunk, &buffers).await });
            async move {
                match task.await {
                    Ok(result) => result.map_err(CheckpointError::from),
                    Err(e) => Err(CheckpointError::Runtime { reason: e.to_string() }),
                }
            }
        })
        .buffered(IN_FLIGHT)
}

fn chunk_ref(manifest: &Manifest, (shard, index): ChunkId) -> ChunkRef {
    let object = &manifest.shards[shard];
    ChunkRef::new(&object.key, object.bytes, manifest.chunk_bytes, index, &object.chunks)
}

fn check(backend: &Backend, manifest: &Manifest) -> Result<(), CheckpointError> {
    manifest.check().map_err(|reason| backend.damaged(&manifest.key(), reason))
}

/// Reads every byte of every shard.
pub(crate) async fn verify(backend: &Arc<Backend>, manifest: &Manifest) -> Result<(), CheckpointError> {
    check(backend, manifest)?;
    visit(backend, manifest, all_chunks(manifest).collect()).await
}

fn all_chunks(manifest: &Manifest) -> impl Iterator<Item = ChunkId> {
    let objects = manifest.shards.iter().enumerate();
    objects.flat_map(|(shard, object)| (0..object.chunks.count()).map(move |index| (shard, index)))
}

/// Reads chunks for their digests alone.
async fn visit(backend: &Arc<Backend>, manifest: &Manifest, wanted: Vec<ChunkId>) -> Result<(), CheckpointError> {
    let job = |chunk| Job::<Nothing> { chunk: chunk_ref(manifest, chunk), wanted: Vec::new() };
    load(backend, wanted.into_iter().map(job).collect()).await
}
