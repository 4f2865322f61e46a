//! JSON, sealed with its right digest, as the manifest or the attempt record of a run whose shards are whole.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use checkpoint::{AttemptInfo, Commit, Digest, Dtype, F32Bytes, RunStore, ShardId, Slice, StoreOptions};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};

const STEP: u64 = 20;
const MANIFEST: &str = "checkpoints/step-000000020/manifest-0001.json";
const ATTEMPT: &str = "attempts/0002.json";

/// The first byte chooses the object; the rest is its JSON. Tells whether a checkpoint could be read.
pub fn run(data: &[u8]) -> bool {
    let Some((choice, json)) = data.split_first() else {
        return false;
    };
    let key = if choice % 8 == 7 { ATTEMPT } else { MANIFEST };
    let memory: Arc<dyn ObjectStore> = Arc::new(sound_run().fork());
    if futures::executor::block_on(memory.put(&Path::from(key), sealed(json).into())).is_err() {
        return false;
    }
    let Some(store) = open(memory) else {
        return false;
    };
    let found = store.newest_valid();
    for commit in store.committed().unwrap_or_default() {
        let Ok(manifest) = store.manifest(&commit) else {
            continue;
        };
        let reader = store.read(&manifest);
        let names: Vec<String> = reader.names().map(str::to_owned).collect();
        let sound = names.iter().filter(|name| reader.read_all_f32(name).is_ok()).count();
        // What verifies can be read; other types than f32 are no part of `read_all_f32`.
        let floats = names.iter().filter(|name| reader.dtype(name) == Some(Dtype::F32)).count();
        if store.verify(&manifest).is_ok() {
            assert_eq!(sound, floats, "verified, but not every tensor can be read");
        }
    }
    matches!(found, Ok(Some((_, damaged))) if damaged.is_empty())
}

/// An input that is accepted.
pub fn seed() -> Vec<u8> {
    let object = futures::executor::block_on(async { sound_run().get(&Path::from(MANIFEST)).await?.bytes().await });
    let text = object.expect("the sound run has a manifest");
    // Without the trailer, which `sealed` puts back.
    let body = &text[..text.len() - 78];
    [b"\0", body, b"}"].concat()
}

/// `json` with the trailer that makes it a sealed object, whatever it is otherwise.
fn sealed(json: &[u8]) -> Vec<u8> {
    let json = json.trim_ascii_end();
    let body = json.strip_suffix(b"}").unwrap_or(json);
    [body, b",\"sha256\":\"", Digest::sha256(body).to_string().as_bytes(), b"\"}\n"].concat()
}

/// A run with one commit of two ranks.
fn sound_run() -> &'static InMemory {
    static RUN: OnceLock<InMemory> = OnceLock::new();
    RUN.get_or_init(|| {
        let memory = Arc::new(InMemory::new());
        // Nothing fails here unless the crate is broken, and then every input shows it.
        let store = open(memory.clone()).expect("a store in memory opens");
        let attempt = store.claim_attempt(&AttemptInfo { world_size: 2, ..Default::default() }).expect("a claim");
        let values = F32Bytes::from(&[0.5f32; 24][..]);
        let shards = (0..2).map(|rank| {
            let id = ShardId { attempt, step: STEP, rank, world_size: 2 };
            let slice = |name, start_numel| Slice { name, shape: &[6, 8], start_numel, data: values.clone() };
            store.write_shard(&id, &[slice("ema/w", rank * 24), slice("model/w", rank * 24)]).expect("a shard")
        });
        let commit =
            Commit { attempt, step: STEP, optimizer_step: STEP, shards: shards.collect(), ..Commit::default() };
        store.commit(commit).expect("a commit");
        memory.fork()
    })
}

fn open(store: Arc<dyn ObjectStore>) -> Option<RunStore> {
    let options = StoreOptions { retry_pause: Duration::ZERO, ..StoreOptions::default() };
    RunStore::over(store, "", "memory:///fuzz", options).ok()
}
