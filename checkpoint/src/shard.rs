//! Shards: what one rank writes for one checkpoint, a safetensors file.
//!
//! A tensor that the shard holds whole keeps its name and shape. A cut one is stored as the 1-D tensor
//! `name[start:end]`, the range being that of its elements in row-major order.

use crate::{
    backend::Landed,
    chunk::{ChunkedObject, Sha256Digest},
    error::CheckpointError,
    keys,
    manifest::{Dtype, check_name, checked_numel},
    runtime,
    store::RunStore,
};
use serde::{Deserialize, Serialize};

/// The tensor data of a shard start at a multiple of this, so that a mapped file is aligned for any vector unit.
const ALIGN_BYTES: usize = 64;
/// The longest header that safetensors' readers accept.
const MAX_HEADER_BYTES: usize = 100_000_000;

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
#[derive(Debug, Clone, Copy)]
pub struct Slice<'a> {
    /// Name with its section: `model/blocks.0.attn.qkv.weight`.
    pub name: &'a str,
    /// Shape of the whole tensor.
    pub shape: &'a [usize],
    /// First element.
    pub start_numel: usize,
    /// Their values.
    pub data: &'a [f32],
}

/// What `commit` needs to know of a shard. Ranks send it to rank 0, as JSON or any serde format.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    /// Relative to the run folder.
    pub key: String,
    /// As in [`ShardId`].
    pub attempt: u32,
    /// As in [`ShardId`].
    pub step: u64,
    /// As in [`ShardId`].
    pub rank: usize,
    /// As in [`ShardId`].
    pub world_size: usize,
    /// Length of the object.
    pub bytes: u64,
    /// Digest of each chunk of [`crate::CHUNK_BYTES`].
    pub sha256: Vec<Sha256Digest>,
    /// What it holds, in file order.
    pub tensors: Vec<SliceRecord>,
}

/// A slice as it lies in a shard.
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
    /// Writes a rank's shard. The bytes depend on the slices alone, not on their order, step or attempt. Slices without
    /// elements of tensors that have some are left out. Memory: one copy of the data.
    ///
    /// Writing the same shard again is fine. The shard is part of no checkpoint before [`RunStore::commit`].
    ///
    /// # Errors
    /// [`CheckpointError::BadShard`] names the tensor; [`CheckpointError::Fenced`] if the shard exists with other bytes;
    /// store errors.
    pub fn write_shard(&self, id: &ShardId, slices: &[Slice<'_>]) -> Result<ShardRecord, CheckpointError> {
        let bad = |reason: String| CheckpointError::BadShard { step: id.step, rank: id.rank, reason };
        if id.rank >= id.world_size {
            return Err(bad(format!("the world size is {}; expected ranks 0 to world size - 1", id.world_size)));
        }
        let (slices, mut tensors) = lay_out(slices).map_err(bad)?;
        let header = header(&tensors).map_err(bad)?;
        for tensor in &mut tensors {
            tensor.offset_bytes += header.len() as u64;
        }
        let mut object = ChunkedObject::new();
        object.extend(&header);
        slices.iter().for_each(|slice| object.extend_f32(slice.data));
        let (payload, fingerprint) = object.finish();

        let key = keys::shard(id.step, id.attempt, id.rank, id.world_size);
        match runtime::wait(self.backend.create(&key, payload, &fingerprint, false))? {
            Landed::Ours => Ok(ShardRecord {
                key,
                attempt: id.attempt,
                step: id.step,
                rank: id.rank,
                world_size: id.world_size,
                bytes: fingerprint.bytes,
                sha256: fingerprint.chunks,
                tensors,
            }),
            Landed::Theirs => Err(CheckpointError::Fenced {
                url: self.backend.url.clone(),
                attempt: id.attempt,
                key,
                reason: "the shard exists with other bytes".to_owned(),
            }),
        }
    }
}

/// Orders the slices by name and range, and places them, offsets counted from the start of the data.
fn lay_out<'a>(slices: &[Slice<'a>]) -> Result<(Vec<Slice<'a>>, Vec<SliceRecord>), String> {
    let mut kept = Vec::with_capacity(slices.len());
    for slice in slices {
        check_name(slice.name)?;
        let numel = checked_numel(slice.name, slice.shape)?;
        let end = slice.start_numel.checked_add(slice.data.len());
        if end.is_none_or(|end| end > numel) {
            return Err(format!(
                "tensor `{}` of shape {:?}: {} elements from {} on; it has {numel}",
                slice.name,
                slice.shape,
                slice.data.len(),
                slice.start_numel
            ));
        }
        if !slice.data.is_empty() || numel == 0 {
            kept.push(*slice);
        }
    }
    kept.sort_by_key(|slice| (slice.name, slice.start_numel));
    let mut offset_bytes = 0u64;
    let mut records: Vec<SliceRecord> = Vec::with_capacity(kept.len());
    for slice in &kept {
        let end_numel = slice.start_numel + slice.data.len();
        if let Some(before) = records.last().filter(|before| before.name == slice.name)
            && (before.end_numel > slice.start_numel || before.shape != slice.shape || end_numel == slice.start_numel)
        {
            return Err(format!(
                "tensor `{}`: elements {} to {end_numel} of shape {:?} come after {} to {} of shape {:?}; expected disjoint ranges of one shape",
                slice.name, slice.start_numel, slice.shape, before.start_numel, before.end_numel, before.shape
            ));
        }
        records.push(SliceRecord {
            name: slice.name.to_owned(),
            dtype: Dtype::F32,
            shape: slice.shape.to_vec(),
            start_numel: slice.start_numel,
            end_numel,
            offset_bytes,
        });
        offset_bytes += (slice.data.len() * Dtype::F32.element_bytes()) as u64;
    }
    Ok((kept, records))
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
    if json_bytes > MAX_HEADER_BYTES {
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

    #[test]
    fn bad_slices_are_named() {
        let data = [0.0f32; 8];
        let slice = |name, shape, start_numel, len: usize| Slice { name, shape, start_numel, data: &data[..len] };
        for (slices, word) in [
            (vec![slice("model/w", &[4], 0, 5)], "`model/w`"),
            (vec![slice("model/w", &[4], usize::MAX, 1)], "`model/w`"),
            (vec![slice("model/w", &[usize::MAX, 2], 0, 1)], "`model/w`"),
            (vec![slice("model/w", &[8], 0, 4), slice("model/w", &[8], 3, 4)], "disjoint"),
            (vec![slice("model/w", &[8], 0, 4), slice("model/w", &[2, 4], 4, 4)], "one shape"),
            (vec![slice("", &[1], 0, 1)], "tensor name"),
            (vec![slice("a\nb", &[1], 0, 1)], "tensor name"),
        ] {
            match lay_out(&slices) {
                Err(reason) => assert!(reason.contains(word), "{reason}"),
                Ok(_) => panic!("accepted: {word}"),
            }
        }
    }

    #[test]
    fn slices_are_ordered_and_empty_ones_left_out() {
        let data = [1.0f32; 4];
        let (_, records) = lay_out(&[
            Slice { name: "b", shape: &[8], start_numel: 4, data: &data },
            Slice { name: "c", shape: &[8], start_numel: 4, data: &[] },
            Slice { name: "a", shape: &[0, 3], start_numel: 0, data: &[] },
            Slice { name: "b", shape: &[8], start_numel: 0, data: &data },
        ])
        .unwrap_or_default();
        let seen: Vec<_> =
            records.iter().map(|r| (r.name.as_str(), r.start_numel, r.end_numel, r.offset_bytes)).collect();
        assert_eq!(seen, [("a", 0, 0, 0), ("b", 0, 4, 0), ("b", 4, 8, 16)]);
    }
}
