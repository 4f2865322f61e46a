//! What nobody needs is found, what is needed or may be in the making is not.

use crate::world::*;
use checkpoint::{Activity, CheckpointError, RunStore, ShardId};
use std::fs;

fn garbage(store: &RunStore, activity: Activity) -> Vec<String> {
    store.garbage(activity).unwrap().into_iter().map(|garbage| garbage.key).collect()
}

#[test]
fn shards_without_commit_and_dead_branches_go_and_the_rest_stays() {
    let run = file_run();
    let store = &run.store;
    let first = claim(store, None);
    save(store, first, 10);
    save(store, first, 20);
    write_rank(store, &ShardId { attempt: first, step: 30, rank: 0, world_size: 2 }, &small()).unwrap();
    assert_eq!(garbage(store, Activity::Running), [""; 0], "it may be on its way to a commit");
    assert_eq!(garbage(store, Activity::Stopped).len(), 1);
    let second = claim(store, Some(10));
    save(store, second, 20);
    let left = run.path.join("checkpoints/step-000000020/attempt-0001/shard-00000-of-00002.safetensors#1");
    fs::write(&left, b"half").unwrap();

    let found = garbage(store, Activity::Running);
    let expected = [
        "checkpoints/step-000000020/attempt-0001/shard-00000-of-00002.safetensors",
        "checkpoints/step-000000020/attempt-0001/shard-00001-of-00002.safetensors",
        "checkpoints/step-000000020/manifest-0001.json",
        "checkpoints/step-000000030/attempt-0001/shard-00000-of-00002.safetensors",
    ];
    assert_eq!(found, expected);
    assert_eq!(store.collect_garbage(Activity::Stopped).unwrap().len(), 5);
    assert_eq!(garbage(store, Activity::Stopped), [""; 0]);
    assert!(!left.exists() && !run.path.join("checkpoints/step-000000030").exists());
    for commit in store.committed().unwrap() {
        store.verify(&store.manifest(&commit).unwrap()).unwrap();
    }
    assert_eq!(newest(store), (Some(20), vec![]));
}

#[test]
fn what_a_damaged_commit_had_is_not_garbage_and_can_be_removed_by_hand() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    save(&run.store, attempt, 10);
    let manifest = save(&run.store, attempt, 20);
    fs::write(run.path.join(manifest.key()), b"{").unwrap();
    assert_eq!(garbage(&run.store, Activity::Stopped), [""; 0]);
    assert_eq!(newest(&run.store), (Some(10), vec![20]));
    assert_eq!(run.store.remove(20).unwrap().len(), 3);
    assert_eq!(newest(&run.store), (Some(10), vec![]));
    assert!(!run.path.join("checkpoints/step-000000020").exists());
}

#[test]
fn a_run_whose_only_checkpoint_is_damaged_starts_again_once_it_is_removed() {
    let run = file_run();
    let manifest = save(&run.store, claim(&run.store, None), 10);
    fs::write(run.path.join(manifest.key()), b"{").unwrap();
    assert!(matches!(run.store.newest_valid(), Err(CheckpointError::AllDamaged { .. })));
    run.store.remove(10).unwrap();
    assert_eq!(newest(&run.store), (None, vec![]));
}
