//! A small model's state, ranks that write it, and the stores to write it to.

use checkpoint::{
    AttemptInfo, CheckpointError, CheckpointReader, Commit, F32Bytes, Manifest, ReadInto, RunStore, ShardId,
    ShardRecord, Slice, StoreOptions, Target,
};
use serde_json::json;
use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};
use tempfile::TempDir;

/// Tensors in flat order, as a rank's buckets hold them; `model/big` is longer than two chunks.
pub const TENSORS: &[(&str, &[usize])] = &[
    ("model/blocks.0.w", &[6, 7]),
    ("model/big", &[1500, 1501]),
    ("model/blocks.0.b", &[7]),
    ("model/scale", &[]),
    ("model/none", &[0, 4]),
    ("ema/blocks.0.w", &[6, 7]),
    ("adamw/exp_avg/blocks.0.w", &[6, 7]),
    ("adamw/exp_avg_sq/blocks.0.w", &[6, 7]),
];

/// The same without the large tensor.
pub fn small() -> Vec<(&'static str, &'static [usize])> {
    TENSORS.iter().copied().filter(|(name, _)| *name != "model/big").collect()
}

/// A value that no other element of any tensor has at any step.
pub fn value(tensor: usize, element: usize, step: u64) -> f32 {
    (tensor * 4_000_000 + element) as f32 * 0.5 + step as f32 * 1e-3
}

pub fn values(tensor: usize, shape: &[usize], step: u64) -> Vec<f32> {
    (0..shape.iter().product()).map(|element| value(tensor, element, step)).collect()
}

/// A folder that goes away, opened as a run.
pub struct FileRun {
    _folder: TempDir,
    pub path: PathBuf,
    pub store: RunStore,
}

pub fn file_run() -> FileRun {
    file_run_of(StoreOptions::default().part_bytes)
}

/// The same with shards cut into objects of so many bytes of data.
pub fn file_run_of(part_bytes: u64) -> FileRun {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("runs/a run");
    let options = StoreOptions { part_bytes, ..StoreOptions::default() };
    let store = RunStore::open_with(path.to_str().unwrap(), options).unwrap();
    FileRun { _folder: folder, path, store }
}

pub fn memory_run() -> RunStore {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    RunStore::open(&format!("memory:///run-{}", NEXT.fetch_add(1, Ordering::Relaxed))).unwrap()
}

pub fn claim(store: &RunStore, resumed_from: Option<u64>) -> u32 {
    store.claim_attempt(&AttemptInfo { resumed_from, world_size: 2, ..AttemptInfo::default() }).unwrap()
}

/// The shard of `rank`: its equal part of all elements laid end to end, cut wherever that falls.
pub fn write_rank(
    store: &RunStore,
    id: &ShardId,
    tensors: &[(&str, &[usize])],
) -> Result<ShardRecord, CheckpointError> {
    let total: usize = tensors.iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let own = share(total, id.rank, id.world_size);
    let data: Vec<Vec<f32>> = tensors.iter().enumerate().map(|(i, (_, shape))| values(i, shape, id.step)).collect();
    let mut slices = Vec::new();
    let mut at = 0;
    for ((name, shape), data) in tensors.iter().zip(&data) {
        let start = own.start.clamp(at, at + data.len()) - at;
        let end = own.end.clamp(at, at + data.len()) - at;
        if !data.is_empty() || id.rank == 0 {
            slices.push(Slice { name, shape, start_numel: start, data: F32Bytes::from(&data[start..end]) });
        }
        at += data.len();
    }
    store.write_shard(id, &slices)
}

pub fn share(total: usize, rank: usize, world_size: usize) -> Range<usize> {
    let each = total.div_ceil(world_size);
    (rank * each).min(total)..((rank + 1) * each).min(total)
}

pub fn write_all(
    store: &RunStore,
    attempt: u32,
    step: u64,
    world_size: usize,
    tensors: &[(&str, &[usize])],
) -> Vec<ShardRecord> {
    let write = |rank| write_rank(store, &ShardId { attempt, step, rank, world_size }, tensors).unwrap();
    (0..world_size).map(write).collect()
}

pub fn content(attempt: u32, step: u64, shards: Vec<ShardRecord>) -> Commit {
    let config = json!({"optimizer": {"lr": 1e-4}, "train": {"lanes": 8}});
    let decision_log = json!([{"step": 3, "skipped": true}]);
    Commit { attempt, step, optimizer_step: step, config, decision_log, shards, ..Commit::default() }
}

/// Writes and commits a checkpoint of the small tensors by two ranks.
pub fn save(store: &RunStore, attempt: u32, step: u64) -> Manifest {
    try_save(store, attempt, step).unwrap()
}

pub fn try_save(store: &RunStore, attempt: u32, step: u64) -> Result<Manifest, CheckpointError> {
    try_save_measured(store, attempt, step, &[])
}

/// The same with metrics.
pub fn save_measured(store: &RunStore, attempt: u32, step: u64, metrics: &[(&str, f64)]) -> Manifest {
    try_save_measured(store, attempt, step, metrics).unwrap()
}

pub fn try_save_measured(
    store: &RunStore,
    attempt: u32,
    step: u64,
    metrics: &[(&str, f64)],
) -> Result<Manifest, CheckpointError> {
    let shards = (0..2).map(|rank| write_rank(store, &ShardId { attempt, step, rank, world_size: 2 }, &small()));
    let metrics = metrics.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    store.commit(Commit { metrics, ..content(attempt, step, shards.collect::<Result<_, _>>()?) })
}

/// The step of the newest valid checkpoint and the steps found damaged.
pub fn newest(store: &RunStore) -> (Option<u64>, Vec<u64>) {
    match store.newest_valid().unwrap() {
        Some((manifest, damaged)) => (Some(manifest.step), damaged.iter().map(|d| d.step).collect()),
        None => (None, Vec::new()),
    }
}

pub fn assert_holds(reader: &CheckpointReader, tensors: &[(&str, &[usize])], step: u64) {
    for (i, (name, shape)) in tensors.iter().enumerate() {
        assert_eq!(reader.shape(name), Some(*shape), "{name}");
        assert_eq!(reader.read_all_f32(name).unwrap(), values(i, shape, step), "{name}");
    }
}

/// Where a read puts values; every piece of it, when it is let go.
pub struct Shelf {
    piece: Vec<f32>,
    at: usize,
    whole: Arc<Mutex<Vec<f32>>>,
}

impl Shelf {
    /// Room for `numel` values, and where to look for them.
    pub fn new(numel: usize) -> (Self, Arc<Mutex<Vec<f32>>>) {
        let whole = Arc::new(Mutex::new(vec![f32::NAN; numel]));
        (Self { piece: vec![f32::NAN; numel], at: 0, whole: whole.clone() }, whole)
    }
}

impl Target for Shelf {
    fn split_to(&mut self, numel: usize) -> Self {
        let rest = self.piece.split_off(numel);
        let at = self.at;
        self.at += numel;
        Self { piece: std::mem::replace(&mut self.piece, rest), at, whole: self.whole.clone() }
    }

    fn values_mut(&mut self) -> &mut [f32] {
        &mut self.piece
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        self.whole.lock().unwrap()[self.at..][..self.piece.len()].copy_from_slice(&self.piece);
    }
}

/// Reads ranges of tensors in one go.
pub fn read_ranges(
    reader: &CheckpointReader,
    ranges: &[(&str, Range<usize>)],
) -> Result<Vec<Vec<f32>>, CheckpointError> {
    let (requests, wholes): (Vec<_>, Vec<_>) = ranges
        .iter()
        .map(|(name, range)| {
            let (out, whole) = Shelf::new(range.len());
            (ReadInto { name, start_numel: range.start, out }, whole)
        })
        .unzip();
    reader.read_into(requests)?;
    Ok(wholes.into_iter().map(|whole| std::mem::take(&mut *whole.lock().unwrap())).collect())
}

/// Every file below a folder, relative to it, sorted.
pub fn files(root: &Path) -> Vec<String> {
    fn walk(folder: &Path, root: &Path, out: &mut Vec<String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => walk(&path, root, out),
                false => out.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned()),
            }
        }
    }
    let mut out = Vec::new();
    walk(root, root, &mut out);
    out.sort();
    out
}
