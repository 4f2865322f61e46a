//! The manifest: what a checkpoint consists of. Its presence is the commit; its content is not trusted until checked.

use crate::{
    backend::Backend,
    chunk::ChunkDigests,
    error::CheckpointError,
    keys,
    sealed::{Format, unseal},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub(crate) const FORMAT: Format = Format { name: "ditharos-checkpoint", version: 2 };
/// Chunk lengths that a reader accepts. The writer uses [`crate::CHUNK_BYTES`].
const CHUNK_BYTES_RANGE: std::ops::RangeInclusive<u64> = 4096..=64 << 20;
const MAX_NAME_BYTES: usize = 512;

/// Element type of a tensor; in JSON as safetensors spells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    U8,
}

impl Dtype {
    /// Bytes of one element.
    pub fn element_bytes(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::U8 => 1,
        }
    }
}

/// A committed checkpoint: the content of its manifest, checked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub(crate) format: String,
    pub(crate) version: u64,
    /// Training step, the number of finished steps.
    pub step: u64,
    /// Optimizer updates done: steps without those skipped.
    pub optimizer_step: u64,
    /// The attempt that wrote it.
    pub attempt: u32,
    /// The committed step that this attempt had continued from.
    pub resumed_from: Option<u64>,
    /// Ranks that wrote it. Says nothing about who may read it.
    pub world_size: usize,
    /// When it was written, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// Program and version that wrote it.
    pub writer: String,
    /// The run's config.
    pub config: Value,
    /// The agreed exceptions so far.
    pub decision_log: Value,
    /// Losses of the newest steps, as far as the run compares later ones with them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub recent_losses: Vec<f64>,
    /// What was measured of these weights, by name (`val_loss/ema`); finite.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
    /// Whether what was due after this step (validation, samples) has been put off for a stop: who resumes does it first.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub put_off: bool,
    /// Length of the digested chunks.
    pub chunk_bytes: u64,
    /// The objects that hold the tensors.
    pub shards: Vec<ObjectRecord>,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorEntry>,
}

/// An object, its length and the digests of its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectRecord {
    /// Relative to the run folder.
    pub key: String,
    /// Length in bytes.
    pub bytes: u64,
    /// One digest per chunk, in order; the last chunk may be shorter.
    #[serde(flatten)]
    pub chunks: ChunkDigests,
}

/// A tensor and where its elements are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Element type.
    pub dtype: Dtype,
    /// Shape; `[]` is a scalar.
    pub shape: Vec<usize>,
    /// Ordered by `start_numel`, without gap or overlap, together the whole tensor in row-major order.
    pub slices: Vec<SliceEntry>,
}

impl TensorEntry {
    /// Number of elements, from the slices (which a checked manifest has compared with the shape).
    pub fn numel(&self) -> usize {
        self.slices.last().map_or(0, |slice| slice.end_numel)
    }
}

/// A contiguous range of a tensor's elements, as contiguous little-endian bytes in one shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SliceEntry {
    /// Index into [`Manifest::shards`].
    pub shard: usize,
    /// First element.
    pub start_numel: usize,
    /// One past the last element.
    pub end_numel: usize,
    /// Where the first element starts, in bytes from the start of the object.
    pub offset_bytes: u64,
}

impl Manifest {
    /// The manifest's own key, relative to the run folder.
    pub fn key(&self) -> String {
        keys::manifest(self.step, self.attempt)
    }

    /// Checks everything that a reader relies on, without trusting any number.
    pub(crate) fn check(&self) -> Result<(), String> {
        if !self.chunk_bytes.is_power_of_two() || !CHUNK_BYTES_RANGE.contains(&self.chunk_bytes) {
            return Err(format!("chunk_bytes = {}; expected a power of two from 4096 to 67108864", self.chunk_bytes));
        }
        for (name, value) in &self.metrics {
            check_name("metric", name)?;
            if !value.is_finite() {
                return Err(format!("the metric `{name}` is {value}; expected a finite number"));
            }
        }
        let mut keys_seen = BTreeSet::new();
        for shard in &self.shards {
            self.check_shard(shard)?;
            if !keys_seen.insert(&shard.key) {
                return Err(format!("it lists the shard `{}` twice", shard.key));
            }
        }
        // No byte serves two elements: what a reader allocates is bounded by what the store really holds.
        let mut free_bytes: Vec<u64> = self.shards.iter().map(|shard| shard.bytes).collect();
        for (name, tensor) in &self.tensors {
            self.check_tensor(name, tensor)?;
            for slice in &tensor.slices {
                let bytes = ((slice.end_numel - slice.start_numel) * tensor.dtype.element_bytes()) as u64;
                let free = &mut free_bytes[slice.shard];
                *free = free.checked_sub(bytes).ok_or_else(|| {
                    format!(
                        "tensor `{name}`: with it, `{}` would hold more than its bytes",
                        self.shards[slice.shard].key
                    )
                })?;
            }
        }
        Ok(())
    }

    /// Shards lie in this step's folder, so that retention of one step never cuts into another.
    fn check_shard(&self, shard: &ObjectRecord) -> Result<(), String> {
        let shown = shard.key.escape_debug();
        let below = shard.key.strip_prefix(&keys::step_folder(self.step)).and_then(|rest| rest.strip_prefix('/'));
        let plain = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        if !below.is_some_and(|rest| rest.split('/').all(plain)) {
            return Err(format!(
                "the shard key `{shown}` leads elsewhere; expected a plain path below `{}/`",
                keys::step_folder(self.step)
            ));
        }
        let chunks = shard.bytes.div_ceil(self.chunk_bytes);
        if shard.chunks.count() as u64 != chunks {
            return Err(format!(
                "the shard `{shown}` of {} bytes has {} chunk digests; expected {chunks}",
                shard.bytes,
                shard.chunks.count()
            ));
        }
        Ok(())
    }

    fn check_tensor(&self, name: &str, tensor: &TensorEntry) -> Result<(), String> {
        check_name("tensor", name)?;
        let numel = checked_numel(name, &tensor.shape)?;
        let mut covered = 0usize;
        for slice in &tensor.slices {
            let range = format!("elements {} to {}", slice.start_numel, slice.end_numel);
            match slice.start_numel {
                start if start > covered => {
                    return Err(format!("no shard holds elements {covered} to {start} of tensor `{name}`"));
                }
                start if start < covered => {
                    return Err(format!("tensor `{name}`: {range} overlap what ends at {covered}"));
                }
                _ => {}
            }
            let is_empty = slice.end_numel <= slice.start_numel;
            if slice.end_numel > numel || (is_empty && numel != 0) || slice.end_numel < slice.start_numel {
                return Err(format!("tensor `{name}` of {numel} elements has a slice of {range}"));
            }
            let shard = self.shards.get(slice.shard).ok_or_else(|| {
                format!("tensor `{name}`, {range}: in shard {}, but there are {}", slice.shard, self.shards.len())
            })?;
            let element_bytes = tensor.dtype.element_bytes() as u64;
            let end = ((slice.end_numel - slice.start_numel) as u64)
                .checked_mul(element_bytes)
                .and_then(|bytes| bytes.checked_add(slice.offset_bytes));
            if !slice.offset_bytes.is_multiple_of(element_bytes) || end.is_none_or(|end| end > shard.bytes) {
                return Err(format!(
                    "tensor `{name}`, {range} at byte {} of `{}`: not inside its {} bytes, or not aligned to {element_bytes}",
                    slice.offset_bytes, shard.key, shard.bytes
                ));
            }
            covered = slice.end_numel;
        }
        if covered != numel || tensor.slices.is_empty() {
            return Err(format!("no shard holds elements {covered} to {numel} of tensor `{name}`"));
        }
        Ok(())
    }
}

/// A name that any tool can print and any file system of tools can split at `/`.
pub(crate) fn check_name(what: &str, name: &str) -> Result<(), String> {
    let fine =
        !name.is_empty() && name.len() <= MAX_NAME_BYTES && name != "__metadata__" && !name.contains(char::is_control);
    fine.then_some(()).ok_or_else(|| {
        format!(
            "`{}` is not a {what} name; expected 1 to {MAX_NAME_BYTES} bytes without control characters",
            name.escape_debug()
        )
    })
}

/// Elements of `shape`; their bytes are guaranteed to fit in `usize` too.
pub(crate) fn checked_numel(name: &str, shape: &[usize]) -> Result<usize, String> {
    let numel = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    numel
        .filter(|numel| numel.checked_mul(8).is_some())
        .ok_or_else(|| format!("tensor `{name}`: the shape {shape:?} has more elements than memory can address"))
}

/// Reads and checks the manifest of `step` by `attempt`.
pub(crate) async fn read_manifest(backend: &Backend, step: u64, attempt: u32) -> Result<Manifest, CheckpointError> {
    let key = keys::manifest(step, attempt);
    let bytes = backend.get_small(&key).await?;
    let manifest: Manifest = unseal(&bytes, &FORMAT, &backend.url, &key)?;
    if (manifest.step, manifest.attempt) != (step, attempt) {
        return Err(backend
            .damaged(&key, format!("it is the manifest of step {} by attempt {}", manifest.step, manifest.attempt)));
    }
    manifest.check().map_err(|reason| backend.damaged(&key, reason))?;
    Ok(manifest)
}
