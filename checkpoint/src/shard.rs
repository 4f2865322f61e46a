//! Shards: what one rank writes for one checkpoint, one or more safetensors files.
//!
//! Several objects of bounded size rather than one in multipart: each is created only if absent (which a multipart upload
//! cannot promise), fits every store's limit on a put, and is sent again alone when it fails.
//!
//! A tensor that the shard holds whole keeps its name and shape. A cut one is stored as the 1-D tensor
//! `name[start:end]`, the range being that of its elements in row-major order.

use crate::{
    backend::{Backend, Landed},
    chunk::{ChunkDigests, fingerprint},
    error::CheckpointError,
    keys,
    manifest::{Dtype, check_name, checked_numel},
    runtime,
    store::RunStore,
    values::F32Bytes,
};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::PutPayload;
use serde::{Deserialize, Serialize};
use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use stores::MAX_HEADER_BYTES;

/// The tensor data of a shard start at a multiple of this, so that a mapped file is aligned for any vector unit.
const ALIGN_BYTES: usize = 64;
/// Parts of a shard that are hashed and sent at a time.
const PARTS_IN_FLIGHT: usize = 4;

/// Whose shard of which checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShardId {
    /// The attempt that was claimed.
    pub attempt: u32,
    /// Training step.
    pub step: u64,
    /// The writing rank, below `world_size`.
    pub rank: usize,
    /// Ranks that write this checkpoint.
    pub world_size: usize,
}

/// Elements `start_numel .. start_numel + data.len()` of a tensor, in row-major order.
#[derive(Debug, Clone)]
pub struct Slice<'a> {
    /// Name with its section: `model/blocks.0.attn.qkv.weight`.
    pub name: &'a str,
    /// Shape of the whole tensor.
    pub shape: &'a [usize],
    /// First element.
    pub start_numel: usize,
    /// Their values.
    pub data: F32Bytes,
}

/// What `commit` needs to know of a rank's shard. Ranks send it to rank 0, as JSON or any serde format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// As in [`ShardId`].
    pub attempt: u32,
    /// As in [`ShardId`].
    pub step: u64,
    /// As in [`ShardId`].
    pub rank: usize,
    /// As in [`ShardId`].
    pub world_size: usize,
    /// The objects that it was written as, at least one.
    pub parts: Vec<PartRecord>,
}

/// One object of a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    /// Relative to the run folder.
    pub key: String,
    /// Length of the object.
    pub bytes: u64,
    /// Digests of its chunks of [`crate::CHUNK_BYTES`].
    pub chunks: ChunkDigests,
    /// What it holds, in file order.
    pub tensors: Vec<SliceRecord>,
}

/// A slice as it lies in an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceRecord {
    /// Name of the tensor.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape of the whole tensor.
    pub shape: Vec<usize>,
    /// First element.
    pub start_numel: usize,
    /// One past the last element.
    pub end_numel: usize,
    /// From the start of the object.
    pub offset_bytes: u64,
}

impl RunStore {
    /// Writes a rank's shard: one object, or several of at most [`crate::StoreOptions::part_bytes`] of data, some of them in
    /// flight at a time. The bytes depend on the slices alone, not on their order, step or attempt. Slices without elements of
    /// tensors that have some are left out. The data are not copied.
    ///
    /// Writing the same shard again is fine. The shard is part of no checkpoint before [`RunStore::commit`].
    ///
    /// # Errors
    /// [`CheckpointError::BadShard`] names the tensor; [`CheckpointError::Fenced`] if an object exists with other bytes;
    /// [`CheckpointError::SlowUpload`] after [`crate::StoreOptions::upload_timeout`]; store errors.
    pub fn write_shard(&self, id: &ShardId, slices: &[Slice<'_>]) -> Result<ShardRecord, CheckpointError> {
        let bad = |reason: String| CheckpointError::BadShard { step: id.step, rank: id.rank, reason };
        if id.rank >= id.world_size {
            return Err(bad(format!("the world size is {}; expected ranks 0 to world size - 1", id.world_size)));
        }
        let parts = lay_out(slices, self.backend.options.part_bytes).map_err(bad)?;
        let bytes: u64 = parts.iter().map(|part| part.data_bytes).sum();
        let written = Arc::new(AtomicU64::new(0));
        let writes = parts.into_iter().enumerate().map(|(number, part)| {
            let key = keys::shard(id.step, id.attempt, id.rank, id.world_size, number);
            let (backend, attempt, written) = (Arc::clone(&self.backend), id.attempt, Arc::clone(&written));
            let data_bytes = part.data_bytes;
            part.encode().map(|object| async move {
                let record = write_part(&backend, attempt, key, object).await;
                written.fetch_add(data_bytes, Ordering::Relaxed);
                record
            })
        });
        let writes = writes.collect::<Result<Vec<_>, String>>().map_err(bad)?;
        let limit = self.backend.options.upload_timeout;
        let parts = runtime::wait(async {
            let parts = futures::stream::iter(writes).buffered(PARTS_IN_FLIGHT).try_collect();
            tokio::time::timeout(limit, parts).await.unwrap_or_else(|_| {
                Err(CheckpointError::SlowUpload {
                    url: self.backend.url.clone(),
                    step: id.step,
                    rank: id.rank,
                    seconds: limit.as_secs(),
                    written_bytes: written.load(Ordering::Relaxed),
                    bytes,
                })
            })
        })?;
        Ok(ShardRecord { attempt: id.attempt, step: id.step, rank: id.rank, world_size: id.world_size, parts })
    }
}

/// A part with its header, ready to be hashed and sent.
struct EncodedPart {
    segments: Vec<Bytes>,
    tensors: Vec<SliceRecord>,
}

async fn write_part(
    backend: &Backend,
    attempt: u32,
    key: String,
    part: EncodedPart,
) -> Result<PartRecord, CheckpointError> {
    let EncodedPart { segments, tensors } = part;
    // Hashing computes; it must not hold up what waits for the network on the runtime's threads.
    let hashed = tokio::task::spawn_blocking(move || (fingerprint(&segments), PutPayload::from_iter(segments))).await;
    let (fingerprint, payload) = hashed.map_err(|e| CheckpointError::Runtime { reason: e.to_string() })?;
    let time_for_bytes = fingerprint.bytes * PARTS_IN_FLIGHT as u64;
    match backend.create(&key, payload, &fingerprint, time_for_bytes, false).await? {
        Landed::Ours => Ok(PartRecord { key, bytes: fingerprint.bytes, chunks: fingerprint.chunks, tensors }),
        Landed::Theirs => Err(CheckpointError::Fenced {
            url: backend.url.clone(),
            attempt,
            key,
            reason: "the shard exists with other bytes".to_owned(),
        }),
    }
}

/// The slices of one object, in file order; offsets count from the start of the data.
#[derive(Default)]
struct Part {
    data: Vec<Bytes>,
    tensors: Vec<SliceRecord>,
    data_bytes: u64,
}

impl Part {
    fn encode(mut self) -> Result<EncodedPart, String> {
        let header = header(&self.tensors)?;
        for tensor in &mut self.tensors {
            tensor.offset_bytes += header.len() as u64;
        }
        let segments = std::iter::once(Bytes::from(header)).chain(self.data).collect();
        Ok(EncodedPart { segments, tensors: self.tensors })
    }
}

/// Orders the slices by name and range and deals them to parts, cutting those that go over a part's end.
fn lay_out(slices: &[Slice<'_>], part_bytes: u64) -> Result<Vec<Part>, String> {
    let mut kept: Vec<&Slice<'_>> = Vec::with_capacity(slices.len());
    for slice in slices {
        check_name("tensor", slice.name)?;
        let numel = checked_numel(slice.name, slice.shape)?;
        let end = slice.start_numel.checked_add(slice.data.numel());
        if end.is_none_or(|end| end > numel) {
            return Err(format!(
                "tensor `{}` of shape {:?}: {} elements from {} on; it has {numel}",
                slice.name,
                slice.shape,
                slice.data.numel(),
                slice.start_numel
            ));
        }
        if slice.data.numel() > 0 || numel == 0 {
            kept.push(slice);
        }
    }
    kept.sort_by_key(|slice| (slice.name, slice.start_numel));
    for pair in kept.windows(2) {
        let [before, slice] = pair else { continue };
        let (before_end, end) = (before.start_numel + before.data.numel(), slice.start_numel + slice.data.numel());
        if before.name == slice.name
            && (before_end > slice.start_numel || before.shape != slice.shape || end == slice.start_numel)
        {
            return Err(format!(
                "tensor `{}`: elements {} to {end} of shape {:?} come after {} to {before_end} of shape {:?}; expected disjoint ranges of one shape",
                slice.name, slice.start_numel, slice.shape, before.start_numel, before.shape
            ));
        }
    }
    let element_bytes = Dtype::F32.element_bytes();
    let part_numel = (part_bytes as usize / element_bytes).max(1);
    let mut parts = vec![Part::default()];
    for slice in kept {
        let (mut done, numel) = (0, slice.data.numel());
        loop {
            if parts.last().is_none_or(|part| part.data_bytes as usize / element_bytes >= part_numel) {
                parts.push(Part::default());
            }
            let Some(part) = parts.last_mut() else { break };
            let taken = (numel - done).min(part_numel - part.data_bytes as usize / element_bytes);
            part.tensors.push(SliceRecord {
                name: slice.name.to_owned(),
                dtype: Dtype::F32,
                shape: slice.shape.to_vec(),
                start_numel: slice.start_numel + done,
                end_numel: slice.start_numel + done + taken,
                offset_bytes: part.data_bytes,
            });
            part.data.push(slice.data.bytes(done..done + taken));
            part.data_bytes += (taken * element_bytes) as u64;
            done += taken;
            if done == numel {
                break;
            }
        }
    }
    Ok(parts)
}

/// Everything before the data: length, JSON, spaces up to the alignment.
fn header(tensors: &[SliceRecord]) -> Result<Vec<u8>, String> {
    #[derive(Serialize)]
    struct Entry<'a> {
        dtype: Dtype,
        shape: &'a [usize],
        data_offsets: [u64; 2],
    }
    let mut bytes = [0u8; 8].to_vec();
    bytes.extend_from_slice(br#"{"__metadata__":{"format":"pt"}"#);
    for tensor in tensors {
        let numel = tensor.end_numel - tensor.start_numel;
        let is_whole = checked_numel(&tensor.name, &tensor.shape)? == numel;
        let name = match is_whole {
            true => tensor.name.clone(),
            false => format!("{}[{}:{}]", tensor.name, tensor.start_numel, tensor.end_numel),
        };
        let end = tensor.offset_bytes + (numel * tensor.dtype.element_bytes()) as u64;
        let shape = if is_whole { tensor.shape.as_slice() } else { &[numel] };
        let entry = Entry { dtype: tensor.dtype, shape, data_offsets: [tensor.offset_bytes, end] };
        let json = |e: serde_json::Error| format!("tensor `{}`: {e}", tensor.name);
        bytes.push(b',');
        serde_json::to_writer(&mut bytes, &name).map_err(json)?;
        bytes.push(b':');
        serde_json::to_writer(&mut bytes, &entry).map_err(json)?;
    }
    bytes.push(b'}');
    bytes.resize(bytes.len().next_multiple_of(ALIGN_BYTES), b' ');
    let json_bytes = bytes.len() - 8;
    if json_bytes as u64 > MAX_HEADER_BYTES {
        return Err(format!(
            "{} slices make a header of {json_bytes} bytes; safetensors allows {MAX_HEADER_BYTES}",
            tensors.len()
        ));
    }
    bytes[..8].copy_from_slice(&(json_bytes as u64).to_le_bytes());
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: u64 = 1 << 20;

    fn slice<'a>(name: &'a str, shape: &'a [usize], start_numel: usize, len: usize) -> Slice<'a> {
        Slice { name, shape, start_numel, data: F32Bytes::from(&[1.0; 8][..len]) }
    }

    #[test]
    fn bad_slices_are_named() {
        for (slices, word) in [
            (vec![slice("model/w", &[4], 0, 5)], "`model/w`"),
            (vec![slice("model/w", &[4], usize::MAX, 1)], "`model/w`"),
            (vec![slice("model/w", &[usize::MAX, 2], 0, 1)], "`model/w`"),
            (vec![slice("model/w", &[8], 0, 4), slice("model/w", &[8], 3, 4)], "disjoint"),
            (vec![slice("model/w", &[8], 0, 4), slice("model/w", &[2, 4], 4, 4)], "one shape"),
            (vec![slice("", &[1], 0, 1)], "tensor name"),
            (vec![slice("a\nb", &[1], 0, 1)], "tensor name"),
        ] {
            match lay_out(&slices, WHOLE) {
                Err(reason) => assert!(reason.contains(word), "{reason}"),
                Ok(_) => panic!("accepted: {word}"),
            }
        }
    }

    fn seen(parts: &[Part]) -> Vec<Vec<(&str, usize, usize, u64)>> {
        parts
            .iter()
            .map(|part| {
                part.tensors.iter().map(|r| (r.name.as_str(), r.start_numel, r.end_numel, r.offset_bytes)).collect()
            })
            .collect()
    }

    #[test]
    fn slices_are_ordered_and_empty_ones_left_out() {
        let slices =
            [slice("b", &[8], 4, 4), slice("c", &[8], 4, 0), slice("a", &[0, 3], 0, 0), slice("b", &[8], 0, 4)];
        let parts = lay_out(&slices, WHOLE).unwrap_or_default();
        assert_eq!(seen(&parts), [[("a", 0, 0, 0), ("b", 0, 4, 0), ("b", 4, 8, 16)]]);
    }

    #[test]
    fn a_part_ends_where_it_is_full() {
        let slices = [slice("a", &[3], 0, 3), slice("b", &[8], 0, 8), slice("c", &[0], 0, 0)];
        let parts = lay_out(&slices, 16).unwrap_or_default();
        let expected =
            [vec![("a", 0, 3, 0), ("b", 0, 1, 12)], vec![("b", 1, 5, 0)], vec![("b", 5, 8, 0), ("c", 0, 0, 12)]];
        assert_eq!(seen(&parts), expected);
        assert_eq!(lay_out(&[], 16).unwrap_or_default().len(), 1, "an empty shard is one object");
    }
}
