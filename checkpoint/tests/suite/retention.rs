//! Deleting old checkpoints.

use crate::world::*;
use checkpoint::CheckpointError;
use std::fs;

#[test]
fn the_newest_are_kept_and_the_rest_leaves_no_trace() {
    let run = file_run();
    for store in [&memory_run(), &run.store] {
        let attempt = claim(store, None);
        write_all(store, attempt, 5, 2, &small());
        (1..=5).for_each(|i| drop(save(store, attempt, i * 10)));
        assert_eq!(store.retain(3).unwrap(), [5, 10, 20]);
        let left: Vec<u64> = store.committed().unwrap().iter().map(|commit| commit.step).collect();
        assert_eq!(left, [50, 40, 30]);
        for commit in store.committed().unwrap() {
            store.verify(&store.manifest(&commit).unwrap()).unwrap();
        }
        assert_eq!(store.retain(3).unwrap(), [0u64; 0]);
    }
    assert_eq!(files(&run.path).len(), 1 + 3 * 3, "one attempt, two shards and a manifest of three steps");
    assert_eq!(fs::read_dir(run.path.join("checkpoints")).unwrap().count(), 3);
}

#[test]
fn at_least_two_are_kept() {
    let store = memory_run();
    let attempt = claim(&store, None);
    (1..=2).for_each(|step| drop(save(&store, attempt, step)));
    assert_eq!(store.retain(2).unwrap(), [0u64; 0]);
    for keep_last in [0, 1] {
        assert!(matches!(store.retain(keep_last), Err(CheckpointError::KeepTooFew { .. })));
    }
}

#[test]
fn nothing_is_deleted_while_the_newest_cannot_be_read() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let manifests: Vec<_> = (1..=4).map(|step| save(&run.store, attempt, step)).collect();
    let shard = run.path.join(&manifests[3].shards[1].key);
    let mut bytes = fs::read(&shard).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&shard, bytes).unwrap();
    let before = files(&run.path);
    let error = run.store.retain(2).unwrap_err();
    assert!(error.is_damage() && error.to_string().contains(&manifests[3].shards[1].key), "{error}");
    assert_eq!(files(&run.path), before);
}

#[test]
fn commits_of_a_dead_branch_do_not_count_as_kept() {
    let store = memory_run();
    let first = claim(&store, None);
    for step in [10, 20, 30, 40] {
        save(&store, first, step);
    }
    let second = claim(&store, Some(20));
    save(&store, second, 25);
    // 30 and 40 are void: the two newest are 25 and 20.
    assert_eq!(store.retain(2).unwrap(), [10]);
    assert_eq!(newest(&store), (Some(25), vec![]));
}

#[test]
fn a_crash_between_manifest_and_shards_is_cleaned_up_next_time() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let manifests: Vec<_> = (1..=4).map(|step| save(&run.store, attempt, step)).collect();
    fs::remove_file(run.path.join(manifests[0].key())).unwrap();
    assert_eq!(run.store.retain(3).unwrap(), [1]);
    assert_eq!(files(&run.path).len(), 1 + 3 * 3);
}
