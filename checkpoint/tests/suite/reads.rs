//! What a read fetches: the chunks that hold what was asked for, and nothing else.

use crate::world::*;
use async_trait::async_trait;
use checkpoint::{Manifest, RunStore, StoreOptions};
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, Result, memory::InMemory, path::Path};
use std::{
    ops::Range,
    sync::{Arc, Mutex},
};
use stores::testing::{Tamper, Tampered};

/// Remembers which bytes of which keys were read.
#[derive(Debug, Default)]
struct Recording(Mutex<Vec<(String, Range<u64>)>>);

#[async_trait]
impl Tamper for Recording {
    async fn get(&self, inner: &InMemory, path: &Path, options: GetOptions) -> Result<GetResult> {
        if !options.head {
            let range = match &options.range {
                Some(GetRange::Bounded(range)) => range.clone(),
                _ => 0..u64::MAX,
            };
            self.0.lock().unwrap().push((path.to_string(), range));
        }
        inner.get_opts(path, options).await
    }
}

/// Each tensor longer than two chunks.
const LARGE: &[(&str, &[usize])] = &[
    ("adamw/exp_avg/w", &[1500, 1501]),
    ("adamw/exp_avg_sq/w", &[1500, 1501]),
    ("ema/w", &[1500, 1501]),
    ("model/w", &[1500, 1501]),
];

fn recorded(part_bytes: u64) -> (Arc<Tampered<Recording>>, RunStore, Manifest) {
    let recording = Arc::new(Tampered::new(Recording::default()));
    let options = StoreOptions { part_bytes, ..StoreOptions::default() };
    let store = RunStore::over(recording.clone(), "run", "test://run", options).unwrap();
    let attempt = claim(&store, None);
    let manifest = store.commit(content(attempt, 5, write_all(&store, attempt, 5, 2, LARGE))).unwrap();
    (recording, store, manifest)
}

/// The chunks of all objects that hold bytes of a tensor: key and range, as they must be read.
fn chunks_of(manifest: &Manifest, name: &str) -> Vec<(String, Range<u64>)> {
    let mut chunks = Vec::new();
    for slice in &manifest.tensors[name].slices {
        let object = &manifest.shards[slice.shard];
        let end = slice.offset_bytes + 4 * (slice.end_numel - slice.start_numel) as u64;
        for index in slice.offset_bytes / manifest.chunk_bytes..end.div_ceil(manifest.chunk_bytes) {
            let start = index * manifest.chunk_bytes;
            chunks.push((format!("run/{}", object.key), start..object.bytes.min(start + manifest.chunk_bytes)));
        }
    }
    chunks.sort_by_key(|(key, range)| (key.clone(), range.start));
    chunks.dedup();
    chunks
}

fn taken(recording: &Tampered<Recording>) -> Vec<(String, Range<u64>)> {
    let mut reads = std::mem::take(&mut *recording.tamper.0.lock().unwrap());
    reads.sort_by_key(|(key, range)| (key.clone(), range.start));
    reads
}

#[test]
fn weights_or_an_average_alone_touch_no_byte_of_the_optimizer_beyond_their_own_chunks() {
    // In one object a rank, and in parts that end within tensors.
    for part_bytes in [256 << 20, 3 << 20] {
        let (recording, store, manifest) = recorded(part_bytes);
        for (index, name) in [(2, "ema/w"), (3, "model/w")] {
            let reader = store.read(&manifest);
            taken(&recording);
            assert_eq!(reader.read_all_f32(name).unwrap(), values(index, &[1500, 1501], 5));
            let (found, expected) = (taken(&recording), chunks_of(&manifest, name));
            assert_eq!(found, expected, "{name} in parts of {part_bytes}");
            let bytes: u64 = found.iter().map(|(_, range)| range.end - range.start).sum();
            assert!(bytes < 4 * 1500 * 1501 + 4 * manifest.chunk_bytes, "{name}: {bytes}");
        }
    }
}

#[test]
fn all_ranks_together_verify_every_chunk_once_and_what_one_reads_is_not_verified_again() {
    let (recording, store, manifest) = recorded(3 << 20);
    taken(&recording);
    let is_read = |name: &str| name.starts_with("ema/");
    for rank in 0..3 {
        let reader = store.read(&manifest);
        let own = share(1500 * 1501, rank, 3);
        let found = read_ranges(&reader, &[("ema/w", own.clone())]).unwrap();
        assert_eq!(found[0], values(2, &[1500, 1501], 5)[own]);
        reader.verify_others(is_read, (rank, 3)).unwrap();
    }
    let mut found = taken(&recording);
    // A chunk in which one rank's share ends and the next one's begins is read by both.
    assert!(found.len() <= all_chunks(&manifest).len() + 2, "{}", found.len());
    found.dedup();
    assert_eq!(found, all_chunks(&manifest));
}

fn all_chunks(manifest: &Manifest) -> Vec<(String, Range<u64>)> {
    let mut all: Vec<_> = manifest
        .shards
        .iter()
        .flat_map(|object| {
            let chunk = move |start: u64| start..object.bytes.min(start + manifest.chunk_bytes);
            let starts = (0..object.bytes).step_by(manifest.chunk_bytes as usize);
            starts.map(move |start| (format!("run/{}", object.key), chunk(start)))
        })
        .collect();
    all.sort_by_key(|(key, range)| (key.clone(), range.start));
    all
}
