//! Processes that share a cache are killed at random while they write to it.
#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use object_store::{ObjectStore, ObjectStoreExt, memory::InMemory, path::Path};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use stores::{BlockCache, Object, RangeReader, ReadOptions};

const MIB: u64 = 1 << 20;
/// Half of what is read.
const LIMIT: u64 = 24 * MIB;
const OBJECT: u64 = 48 * MIB + 333;
const CACHE: &str = "DITHAROS_TEST_CACHE";
/// Kills of the default test; `DITHAROS_CRASHES` asks for more.
const KILLS: u64 = 12;

/// The same object in every process.
async fn object() -> (Arc<InMemory>, Object, Bytes) {
    let mut content = vec![0; OBJECT as usize];
    ChaCha8Rng::seed_from_u64(9).fill_bytes(&mut content);
    let (store, path, content) = (Arc::new(InMemory::new()), Path::from("a"), Bytes::from(content));
    store.put(&path, content.clone().into()).await.unwrap();
    // A memory store counts its writes for ETags, so this one is the same in all processes.
    let object = Object::new(&store.head(&path).await.unwrap(), "test://bucket/a");
    (store, object, content)
}

fn reader(store: Arc<dyn ObjectStore>, dir: &std::path::Path) -> RangeReader {
    let cache = BlockCache::open(dir, LIMIT, |warning| panic!("{warning}")).unwrap();
    RangeReader::new(store, ReadOptions::default(), Some(Arc::new(cache)))
}

/// Not a test of its own: what the killed processes do.
#[test]
#[ignore = "is started by the other test"]
fn child() {
    let Some(dir) = std::env::var_os(CACHE) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (store, object, content) = object().await;
        let reader = reader(store, dir.as_ref());
        let mut rng = ChaCha8Rng::seed_from_u64(std::process::id().into());
        // Ends by itself if its parent is gone.
        for _ in 0..20_000 {
            let ranges: Vec<_> = (0..4)
                .map(|_| {
                    let start = rng.random_range(0..OBJECT - 1);
                    start..OBJECT.min(start + rng.random_range(1..3 * MIB))
                })
                .collect();
            for (range, found) in ranges.iter().zip(reader.read(&object, &ranges).await.unwrap()) {
                assert!(found == content[range.start as usize..range.end as usize], "wrong bytes in {range:?}");
            }
        }
    });
}

fn start(dir: &std::path::Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--ignored", "--nocapture"])
        .env(CACHE, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Bytes of all files below a folder; files may vanish meanwhile.
fn bytes_below(dir: &std::path::Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(meta) if meta.is_dir() => bytes_below(&entry.path()),
            Ok(meta) => meta.len(),
            Err(_) => 0,
        })
        .sum()
}

#[test]
fn killed_writers_leave_right_bytes_and_the_bound() {
    let dir = tempfile::tempdir().unwrap();
    let kills = std::env::var("DITHAROS_CRASHES").ok().and_then(|text| text.parse().ok()).unwrap_or(KILLS);
    let seed: u64 = std::process::id().into();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut children: Vec<Child> = (0..3).map(|_| start(dir.path())).collect();
    let mut largest = 0;
    for kill in 0..kills {
        std::thread::sleep(Duration::from_millis(rng.random_range(50..300)));
        largest = largest.max(bytes_below(dir.path()));
        assert!(largest <= LIMIT, "seed {seed}, kill {kill}: {largest} bytes, allowed are {LIMIT}");
        let victim = rng.random_range(0..children.len());
        let mut child = std::mem::replace(&mut children[victim], start(dir.path()));
        child.kill().unwrap();
        let ended = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.signal(), Some(9), "seed {seed}: it ended by itself: {text}");
    }
    for mut child in children {
        child.kill().unwrap();
        let ended = child.wait_with_output().unwrap();
        assert_eq!(ended.status.signal(), Some(9), "{}", String::from_utf8_lossy(&ended.stderr));
    }
    assert!(largest > LIMIT / 2, "the cache was in use: {largest} bytes");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (store, object, content) = object().await;
        let reader = reader(store, dir.path());
        for start in (0..OBJECT).step_by(5 * MIB as usize) {
            let range = start..OBJECT.min(start + 5 * MIB);
            let found = reader.read(&object, std::slice::from_ref(&range)).await.unwrap();
            assert!(found[0] == content[range.start as usize..range.end as usize], "wrong bytes in {range:?}");
        }
    });
    assert!(bytes_below(dir.path()) <= LIMIT);
}
