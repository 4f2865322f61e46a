#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
use super::*;
use crate::testing::{Tamper, Tampered};
use futures::stream::{self, BoxStream};
use object_store::{Error, GetResult, GetResultPayload, Result, memory::InMemory};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Writes down what ranges are asked for and spoils a share of the answers.
#[derive(Debug)]
struct Recording {
    requests: Mutex<Vec<Range<u64>>>,
    rng: Mutex<ChaCha8Rng>,
    /// Of all answers.
    faults: f64,
    deny: bool,
    warned: AtomicUsize,
}

#[async_trait::async_trait]
impl Tamper for Recording {
    async fn get(&self, inner: &InMemory, location: &Path, options: GetOptions) -> Result<GetResult> {
        if options.head {
            return inner.get_opts(location, options).await;
        }
        let Some(object_store::GetRange::Bounded(range)) = &options.range else { panic!("{options:?}") };
        self.requests.lock().unwrap().push(range.clone());
        if self.deny {
            let source = "see http://me:SECRET@host/a?sig=SECRET".into();
            return Err(Error::PermissionDenied { path: location.to_string(), source });
        }
        let fault = {
            let rng = &mut *self.rng.lock().unwrap();
            rng.random_bool(self.faults).then(|| rng.random_range(0..6))
        };
        let mut result = inner.get_opts(location, options).await?;
        let (meta, attributes) = (result.meta.clone(), result.attributes.clone());
        let mut range = result.range.clone();
        if fault == Some(1) {
            range.end -= 1;
            result = inner.get_opts(location, GetOptions::new().with_range(Some(range.clone()))).await?;
        }
        let broken = || Error::Generic { store: "test", source: "503 or a reset".into() };
        let mut body = result.bytes().await?;
        let chunks: BoxStream<'static, Result<Bytes>> = match fault {
            Some(0) => return Err(broken()),
            Some(2) => return std::future::pending().await,
            Some(3) => Box::pin(stream::iter([Ok(body.split_to(body.len() / 2))])),
            Some(4) => Box::pin(stream::iter([Ok(body.split_to(body.len() / 2)), Err(broken())])),
            Some(5) => Box::pin(stream::iter([Ok(body.split_to(body.len() / 2))]).chain(stream::pending())),
            _ => Box::pin(stream::iter([Ok(body.split_to(body.len() / 3)), Ok(body)])),
        };
        let payload = GetResultPayload::Stream(chunks);
        Ok(GetResult { payload, meta, range, attributes, extensions: Default::default() })
    }
}

fn random(bytes: u64, seed: u64) -> Vec<u8> {
    let mut content = vec![0; bytes as usize];
    ChaCha8Rng::seed_from_u64(seed).fill_bytes(&mut content);
    content
}

struct World {
    store: Arc<Tampered<Recording>>,
    content: Vec<u8>,
    object: Object,
    cache: Option<tempfile::TempDir>,
    reader: RangeReader,
}

const QUICK: ReadOptions = ReadOptions {
    try_timeout: Duration::from_millis(300),
    min_bytes_per_s: MIB,
    silence: Duration::from_millis(50),
    tries: 12,
    pause: Duration::from_micros(1),
    gap_bytes: MIB,
    request_bytes: 8 * MIB,
    requests_at_once: 4,
};

impl World {
    async fn new(bytes: u64, faults: f64, deny: bool, cached: bool) -> Self {
        let (content, path) = (random(bytes, 3), Path::from("a"));
        let rng = Mutex::new(ChaCha8Rng::seed_from_u64(1));
        let (requests, warned) = (Mutex::default(), AtomicUsize::new(0));
        let store = Arc::new(Tampered::new(Recording { requests, rng, faults, deny, warned }));
        store.put(&path, content.clone().into()).await.unwrap();
        let object = Object::new(&store.head(&path).await.unwrap(), "test://me:SECRET@bucket/a");
        let cache = cached.then(|| tempfile::tempdir().unwrap());
        let reader = Self::reader(&store, cache.as_ref());
        Self { store, content, object, cache, reader }
    }

    fn reader(store: &Arc<Tampered<Recording>>, dir: Option<&tempfile::TempDir>) -> RangeReader {
        let told = store.clone();
        let cache = dir.map(|dir| {
            let warn = move |_: &str| _ = told.tamper.warned.fetch_add(1, SeqCst);
            Arc::new(BlockCache::open(dir.path(), 64 * MIB, warn).unwrap())
        });
        RangeReader::new(store.clone(), QUICK, cache)
    }

    async fn assert_reads(&self, ranges: &[Range<u64>]) {
        let found = self.reader.read(&self.object, ranges).await.unwrap();
        for (range, found) in ranges.iter().zip(found) {
            assert!(found == self.content[range.start as usize..range.end as usize], "wrong bytes in {range:?}");
        }
    }

    fn requests(&self) -> Vec<Range<u64>> {
        let mut requests = std::mem::take(&mut *self.store.tamper.requests.lock().unwrap());
        requests.sort_by_key(|range| range.start);
        requests
    }

    fn block_files(&self) -> Vec<std::path::PathBuf> {
        let folders = std::fs::read_dir(self.cache.as_ref().unwrap().path().join("blocks-1")).unwrap();
        let folders = folders.map(|entry| entry.unwrap().path()).filter(|path| path.is_dir());
        folders.flat_map(|folder| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path())).collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_request_for_near_ranges_and_parallel_ones_for_a_large_range() {
    let world = World::new(20 * MIB, 0.0, false, false).await;
    world.assert_reads(&[9000..9100, 0..100, 9000 + MIB..9001 + MIB, 7..7]).await;
    assert_eq!(world.requests(), [0..9001 + MIB]);
    world.assert_reads(&[0..1, 3 * MIB..20 * MIB]).await;
    let third = (17 * MIB).div_ceil(3);
    let parts = [3 * MIB..3 * MIB + third, 3 * MIB + third..3 * MIB + 2 * third, 3 * MIB + 2 * third..20 * MIB];
    assert_eq!(world.requests()[1..], parts);
}

#[tokio::test(flavor = "multi_thread")]
async fn cached_blocks_are_read_once_by_all_that_come_after() {
    let mut world = World::new(20 * MIB - 5, 0.0, false, true).await;
    let ranges = [10..20, MIB - 1..MIB + 1, 5 * MIB..17 * MIB, 20 * MIB - 9..20 * MIB - 5];
    world.assert_reads(&ranges).await;
    let runs = [0..2 * MIB, 5 * MIB..13 * MIB, 13 * MIB..17 * MIB, 19 * MIB..20 * MIB - 5];
    assert_eq!(world.requests(), runs, "whole blocks, few requests");
    world.assert_reads(&ranges).await;
    world.reader = World::reader(&world.store, world.cache.as_ref());
    world.assert_reads(&ranges).await;
    assert_eq!(world.requests(), []);
    let names: String = world.block_files().iter().map(|path| path.display().to_string()).collect();
    assert!(!names.contains("bucket") && !names.contains("SECRET"));
}

#[tokio::test(flavor = "multi_thread")]
async fn spoilt_blocks_are_found_and_fetched_again() {
    let world = World::new(8 * MIB, 0.0, false, true).await;
    world.assert_reads(&[0..8 * MIB]).await;
    world.requests();
    let files = world.block_files();
    for (number, file) in files.iter().enumerate() {
        let mut content = std::fs::read(file).unwrap();
        match number {
            0 => content.truncate(1000),
            1 => content.clear(),
            2 => content.push(0),
            3 => content = std::fs::read(&files[4]).unwrap(),
            4 => continue,
            _ => content[99 + number * 10_000] ^= 4,
        }
        std::fs::write(file, content).unwrap();
    }
    world.assert_reads(&[0..8 * MIB]).await;
    let fetched: u64 = world.requests().iter().map(|range| range.end - range.start).sum();
    assert_eq!(fetched, 7 * MIB);
    world.assert_reads(&[0..8 * MIB]).await;
    assert_eq!(world.requests(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_wrong_answer_is_tried_again() {
    for cached in [false, true] {
        let world = World::new(6 * MIB + 77, 0.4, false, cached).await;
        for start in (0..4 * MIB).step_by(500_000) {
            world.assert_reads(&[start..start + 1000, start + 2 * MIB..6 * MIB + 77]).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_names_object_range_and_tries() {
    let world = World::new(MIB, 1.0, false, false).await;
    let error = world.reader.read(&world.object, &[5..9]).await.unwrap_err().to_string();
    assert!(
        error.contains("test://bucket/a") && error.contains("bytes 5 to 9") && error.contains("12 tries"),
        "{error}"
    );
    assert_eq!(world.requests().len(), 12);
    let denied = World::new(MIB, 0.0, true, false).await;
    let error = denied.reader.read(&denied.object, &[5..9]).await.unwrap_err().to_string();
    assert_eq!(denied.requests().len(), 1, "another try cannot help");
    assert!(error.contains("after 1 of at most 12 tries") && !error.contains("SECRET"), "{error}");
    let error = world.reader.read(&world.object, &[5..MIB + 1]).await.unwrap_err().to_string();
    assert!(error.contains("1048576 bytes"), "{error}");
    assert_eq!(world.requests(), []);
    world.store.delete(&world.object.path).await.unwrap();
    let gone = world.reader.read(&world.object, &[5..9]).await.unwrap_err();
    assert!(matches!(gone, ReadError::Missing { .. }), "{gone}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_object_that_changes_is_an_error_and_never_a_mix() {
    for cached in [false, true] {
        for bytes in [4 * MIB, 4 * MIB + 1, 2 * MIB] {
            let world = World::new(4 * MIB, 0.0, false, cached).await;
            world.assert_reads(&[0..9]).await;
            world.store.put(&world.object.path, random(bytes, 4).into()).await.unwrap();
            let error = world.reader.read(&world.object, &[0..9, 3 * MIB..3 * MIB + 5]).await.unwrap_err();
            assert!(matches!(&error, ReadError::Changed { object, .. } if object == "test://bucket/a"), "{error}");
            // Who opens it anew gets the new bytes.
            let object = Object::new(&world.store.head(&world.object.path).await.unwrap(), "test://bucket/a");
            let found = world.reader.read(&object, &[0..9]).await.unwrap();
            assert_eq!(found[0], random(bytes, 4)[..9]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_one_block_fetch_it_once_also_if_the_first_gives_up() {
    let world = World::new(4 * MIB, 0.0, false, true).await;
    let readers = (0..20u64).map(|start| world.reader.read(&world.object, vec![start..MIB + start + 9].leak()));
    for (start, found) in futures::future::try_join_all(readers).await.unwrap().iter().enumerate() {
        assert_eq!(found[0], world.content[start..start + MIB as usize + 9]);
    }
    assert_eq!(world.requests(), [0..2 * MIB]);
    let (cache, key) = (world.reader.cache.as_ref().unwrap(), BlockKey::new(&world.object.identity().unwrap(), 3));
    let Claim::Ours(first) = cache.claim(key) else { panic!("nobody has claimed it") };
    let ranges = [3 * MIB..3 * MIB + 5];
    let mut second = Box::pin(world.assert_reads(&ranges));
    assert!(futures::poll!(&mut second).is_pending());
    drop(first);
    second.await;
    assert_eq!(world.requests(), [3 * MIB..4 * MIB]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_nothing_is_one_warning() {
    let world = World::new(8 * MIB, 0.0, false, true).await;
    for byte in 0..=255u8 {
        let folder = world.cache.as_ref().unwrap().path().join(format!("blocks-1/{byte:02x}"));
        std::fs::write(folder, b"no folder").unwrap();
    }
    world.assert_reads(&[0..8 * MIB]).await;
    world.assert_reads(&[0..8 * MIB]).await;
    assert_eq!(world.requests().len(), 2);
    assert_eq!(world.store.tamper.warned.load(SeqCst), 1);
}
