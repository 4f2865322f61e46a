//! The same protocol on a server that the environment names.

use crate::world::*;
use checkpoint::{Retention, RunStore, digest};
use std::{collections::BTreeSet, time::SystemTime};
use stores::testing::MiniS3;

/// Start a server, export its credentials (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP=true`, …), then
/// `DITHAROS_TEST_STORE=s3://bucket/prefix cargo test --release -p checkpoint real_server -- --ignored`.
#[test]
#[ignore = "needs DITHAROS_TEST_STORE=URL and a server behind it"]
fn a_run_on_a_real_server() {
    let base = std::env::var("DITHAROS_TEST_STORE").unwrap();
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let store = RunStore::open(&format!("{base}/run-{nanos}")).unwrap();
    assert_eq!(newest(&store), (None, vec![]));
    let claimed: BTreeSet<u32> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| claim(&store, None))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(claimed, (1..=8).collect());
    for (step, world_size) in [(10, 1), (20, 4), (30, 2)] {
        store.commit(content(8, step, write_all(&store, 8, step, world_size, TENSORS))).unwrap();
    }
    let (manifest, damaged) = store.newest_valid().unwrap().unwrap();
    assert_eq!((manifest.step, damaged.len()), (30, 0));
    assert_holds(&store.read(&manifest), TENSORS, 30);
    assert_eq!(digest::section_digests(&store.read(&manifest)).unwrap().len(), 3);
    assert_eq!(store.retain(&Retention::last(2)).unwrap(), [10]);
    let second = claim(&store, Some(20));
    assert_eq!(newest(&store), (Some(20), vec![]));
    assert!(try_save(&store, 8, 40).is_err());
    save(&store, second, 30);
    assert_eq!(newest(&store), (Some(30), vec![]));
}

#[test]
fn a_run_on_a_server_that_speaks_the_dialect_of_gcs() {
    let requests = MiniS3::new().passes_as_gcs("real_server::a_run_on_a_real_server");
    let is_commit = |line: &String| line.starts_with("PUT /bucket/prefix%2Frun") && line.contains("manifest");
    assert!(requests.iter().any(is_commit), "{requests:?}");
}
