//! Stores that answer wrongly, late or not at all.

use crate::world::*;
use async_trait::async_trait;
use bytes::Bytes;
use checkpoint::{CheckpointError, Metric, Retention, RunStore, StoreOptions};
use futures::stream::BoxStream;
use object_store::{
    Error, GetOptions, GetResult, ObjectStore, ObjectStoreExt, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use stores::testing::{Tamper, Tampered};

/// What the next put of a matching key does.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    ExistsThoughLanded,
    ExistsNothingLanded,
    ErrorThoughLanded,
    ErrorNothingLanded,
    OkNothingLanded,
    OthersWonBefore,
    Denied,
    Hang,
}

/// Makes puts of keys that contain `on` go wrong in the given order.
#[derive(Debug, Default)]
struct Misbehaving {
    on: String,
    faults: Mutex<VecDeque<Fault>>,
    reads_fail: bool,
    /// So many deletes go through before all fail; `None`: all go through.
    deletes_left: Option<AtomicUsize>,
}

fn broken() -> Error {
    Error::Generic { store: "test", source: "connection to http://me:SECRET@host/x?sig=SECRET reset".into() }
}

#[async_trait]
impl Tamper for Misbehaving {
    async fn put(&self, inner: &InMemory, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let matching = location.as_ref().contains(&self.on);
        let fault = if matching { self.faults.lock().unwrap().pop_front() } else { None };
        let exists = || Error::AlreadyExists { path: location.to_string(), source: "409".into() };
        match fault {
            None => inner.put_opts(location, payload, opts).await,
            Some(Fault::ExistsThoughLanded) => inner.put_opts(location, payload, opts).await.and(Err(exists())),
            Some(Fault::ExistsNothingLanded) => Err(exists()),
            Some(Fault::ErrorThoughLanded) => inner.put_opts(location, payload, opts).await.and(Err(broken())),
            Some(Fault::ErrorNothingLanded) => Err(broken()),
            Some(Fault::OkNothingLanded) => {
                Ok(PutResult { e_tag: None, version: None, extensions: Default::default() })
            }
            Some(Fault::OthersWonBefore) => {
                inner.put(location, Bytes::from_static(b"theirs").into()).await?;
                inner.put_opts(location, payload, opts).await
            }
            Some(Fault::Denied) => Err(Error::PermissionDenied { path: location.to_string(), source: "403".into() }),
            Some(Fault::Hang) => std::future::pending().await,
        }
    }
    async fn get(&self, inner: &InMemory, location: &Path, options: GetOptions) -> Result<GetResult> {
        if self.reads_fail { Err(broken()) } else { inner.get_opts(location, options).await }
    }
    fn delete(
        &self,
        inner: &InMemory,
        locations: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let Some(left) = &self.deletes_left else { return inner.delete_stream(locations) };
        match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
            Ok(_) => inner.delete_stream(locations),
            // An error that is not worth another try.
            Err(_) => Box::pin(futures::stream::once(async {
                Err(Error::PermissionDenied { path: "deleted".to_owned(), source: "403".into() })
            })),
        }
    }
}

fn run(on: &str, faults: &[Fault]) -> RunStore {
    let store = Misbehaving {
        on: on.to_owned(),
        faults: Mutex::new(faults.iter().copied().collect()),
        ..Misbehaving::default()
    };
    over(Tampered::new(store))
}

fn over(store: Tampered<Misbehaving>) -> RunStore {
    let options = StoreOptions { op_timeout: Duration::from_secs(2), ..StoreOptions::default() };
    RunStore::over(Arc::new(store), "some/prefix", "test://me:SECRET@bucket/run?sig=SECRET", options).unwrap()
}

const OBJECTS: [&str; 3] = ["attempts/", "shard-00001", "manifest-"];

#[test]
fn wrong_answers_of_a_create_do_not_matter() {
    use Fault::*;
    for on in OBJECTS {
        for faults in [
            &[ExistsThoughLanded][..],
            &[ExistsNothingLanded],
            &[ErrorThoughLanded],
            &[ErrorNothingLanded],
            &[ExistsNothingLanded, ErrorNothingLanded, ExistsThoughLanded],
            &[ErrorNothingLanded, ErrorThoughLanded],
        ] {
            let store = run(on, faults);
            let attempt = claim(&store, None);
            assert_eq!(attempt, 1, "{on} {faults:?}: the number is ours, not another's");
            save(&store, attempt, 10);
            let (manifest, damaged) = store.newest_valid().unwrap().unwrap();
            assert_eq!((manifest.step, damaged.len()), (10, 0), "{on} {faults:?}");
            assert_holds(&store.read(&manifest), &small(), 10);
        }
    }
}

#[test]
fn success_without_an_object_is_tried_again() {
    for on in ["attempts/", "manifest-"] {
        let store = run(on, &[Fault::OkNothingLanded]);
        let attempt = claim(&store, None);
        save(&store, attempt, 10);
        assert_eq!(newest(&store), (Some(10), vec![]), "{on}");
    }
    // A shard is not read back (it may be large), but the commit looks for it.
    let store = run("shard-00001", &[Fault::OkNothingLanded]);
    let attempt = claim(&store, None);
    let error = try_save(&store, attempt, 10).unwrap_err();
    assert!(error.to_string().contains("shard-00001-of-00002"), "{error}");
    assert_eq!(store.committed().unwrap(), []);
}

#[test]
fn other_bytes_under_our_name_fence_us() {
    let store = run("attempts/", &[Fault::OthersWonBefore]);
    assert_eq!(claim(&store, None), 2, "number 1 is theirs");
    let store = run("shard-00001", &[Fault::OthersWonBefore]);
    let attempt = claim(&store, None);
    let error = try_save(&store, attempt, 10).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Fenced { attempt: 1, key, .. } if key.contains("shard-00001")),
        "{error}"
    );
    assert_eq!(store.committed().unwrap(), []);
    // What is there in the manifest's place is no manifest: it is named, and not replaced.
    let store = run("manifest-", &[Fault::OthersWonBefore]);
    let attempt = claim(&store, None);
    let error = try_save(&store, attempt, 10).unwrap_err();
    assert!(matches!(&error, CheckpointError::Damaged { key, .. } if key.contains("manifest-0001")), "{error}");
    assert!(matches!(store.newest_valid(), Err(CheckpointError::AllDamaged { .. })));
}

/// A store that overwrites where it should refuse: both processes have read their own record back, one before the other wrote.
#[test]
fn of_two_winners_of_one_create_the_overwritten_one_commits_nothing() {
    let run = |store: &Arc<Tampered<Misbehaving>>| {
        RunStore::over(store.clone(), "some/prefix", "test://bucket/run", StoreOptions::default()).unwrap()
    };
    let stores = [(); 2].map(|()| Arc::new(Tampered::<Misbehaving>::default()));
    let [first, second] = [run(&stores[0]), run(&stores[1])];
    assert_eq!((claim(&first, None), claim(&second, None)), (1, 1));
    let path = Path::from("some/prefix/attempts/0001.json");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let theirs = stores[1].get(&path).await.unwrap().bytes().await.unwrap();
        stores[0].put(&path, theirs.into()).await.unwrap();
    });
    let error = try_save(&first, 1, 10).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Fenced { attempt: 1, reason, .. } if reason.contains("two creates win")),
        "{error}"
    );
    assert_eq!(first.committed().unwrap(), []);
}

#[test]
fn a_store_that_never_answers_fails_in_time_and_by_name() {
    for (on, fault) in
        [("attempts/", Fault::Hang), ("attempts/", Fault::ErrorNothingLanded), ("attempts/", Fault::Denied)]
    {
        let store = run(on, &[fault; 50]);
        let start = Instant::now();
        let error = store.claim_attempt(&Default::default()).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(20), "{fault:?}");
        let text = format!("{error} {error:?}");
        assert!(text.contains("test://bucket/run") && text.contains("attempts/0001.json"), "{text}");
        assert!(!text.contains("SECRET"), "{text}");
        assert_eq!(matches!(error, CheckpointError::Timeout { .. }), fault == Fault::Hang);
    }
}

#[test]
fn an_upload_that_takes_too_long_names_rank_step_and_how_far_it_came() {
    // Parts of 64 bytes, the third of which never lands.
    let store =
        Misbehaving { on: "part-0002".to_owned(), faults: Mutex::new([Fault::Hang; 9].into()), ..Default::default() };
    let options = StoreOptions { part_bytes: 64, upload_timeout: Duration::from_secs(1), ..StoreOptions::default() };
    let store = RunStore::over(Arc::new(Tampered::new(store)), "run", "test://bucket/run", options).unwrap();
    let attempt = claim(&store, None);
    let id = checkpoint::ShardId { attempt, step: 7, rank: 1, world_size: 2 };
    let error = write_rank(&store, &id, &small()).unwrap_err();
    let CheckpointError::SlowUpload { rank: 1, step: 7, seconds: 1, written_bytes, bytes, .. } = error else {
        panic!("{error}");
    };
    assert!(written_bytes >= 128 && written_bytes < bytes && bytes > 192, "{error}");
    assert!(error.to_string().contains("checkpoint.upload_timeout_s"), "{error}");
}

#[test]
fn a_store_that_cannot_be_read_is_not_a_damaged_checkpoint() {
    let inner = Arc::new(InMemory::new());
    let writer = RunStore::over(inner.clone(), "some/prefix", "test://x", StoreOptions::default()).unwrap();
    let attempt = claim(&writer, None);
    save(&writer, attempt, 10);
    let reader = over(Tampered { inner: inner.fork(), tamper: Misbehaving { reads_fail: true, ..Default::default() } });
    let error = reader.newest_valid().unwrap_err();
    assert!(matches!(error, CheckpointError::Store { .. }), "neither nothing nor damage: {error}");
    assert!(reader.retain(&Retention::last(2)).is_err());
}

#[test]
fn retention_that_dies_after_any_delete_leaves_no_manifest_without_its_shards() {
    let metric = Metric { name: "loss".to_owned(), higher_is_better: false };
    let retention = Retention { keep_last: 2, keep_every: 4, keep_best: Some((1, metric)) };
    // Steps 1, 3 and 5 go, of three objects each; 2 is the best, 4 a multiple, 6 and 7 are the newest.
    for deletes in 0..=9 {
        let store = over(Tampered::new(Misbehaving { deletes_left: Some(deletes.into()), ..Default::default() }));
        let attempt = claim(&store, None);
        for (step, loss) in [(1, 0.5), (2, 0.1), (3, 0.3), (4, 0.6), (5, 0.2), (6, 0.9), (7, 0.7)] {
            save_measured(&store, attempt, step, &[("loss", loss)]);
        }
        assert_eq!(store.retain(&retention).is_ok(), deletes == 9, "after {deletes} deletes");
        let committed = store.committed().unwrap();
        for commit in &committed {
            store.verify(&store.manifest(commit).unwrap()).unwrap();
        }
        let steps: Vec<u64> = committed.iter().map(|commit| commit.step).collect();
        assert!([7, 6, 4, 2].iter().all(|step| steps.contains(step)), "{steps:?} after {deletes} deletes");
        assert_eq!(steps.len(), 4 + 3usize.saturating_sub(deletes.div_ceil(3)), "after {deletes} deletes");
    }
}

/// Only S3's client decides how long an unreachable server is tried: nothing listens on this port.
#[test]
fn an_unreachable_server_fails_within_the_deadline() {
    let store: Arc<dyn ObjectStore> = Arc::new(
        object_store::aws::AmazonS3Builder::new()
            .with_endpoint("http://127.0.0.1:9")
            .with_allow_http(true)
            .with_bucket_name("b")
            .with_access_key_id("id")
            .with_secret_access_key("SECRET")
            .build()
            .unwrap(),
    );
    let options = StoreOptions { op_timeout: Duration::from_secs(2), ..StoreOptions::default() };
    let store = RunStore::over(store, "run", "s3://b/run", options).unwrap();
    let start = Instant::now();
    let error = store.newest_valid().unwrap_err().to_string();
    assert!(start.elapsed() < Duration::from_secs(20));
    assert!(error.contains("s3://b/run") && !error.contains("SECRET"), "{error}");
}
