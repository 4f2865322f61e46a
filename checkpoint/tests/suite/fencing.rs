//! Attempts: who may commit what, and which commits count.

use crate::world::*;
use checkpoint::{AttemptInfo, CheckpointError, RunStore};
use std::{collections::BTreeSet, fs};

fn steps(store: &RunStore) -> Vec<(u64, u32)> {
    store.committed().unwrap().iter().map(|commit| (commit.step, commit.attempt)).collect()
}

#[test]
fn attempts_are_numbered_and_recorded() {
    for store in [memory_run(), file_run().store] {
        assert_eq!((claim(&store, None), claim(&store, Some(5))), (1, 2));
        let record = store.attempt(2).unwrap();
        assert_eq!((record.attempt, record.resumed_from, record.world_size), (2, Some(5), 2));
    }
}

#[test]
fn of_many_claims_at_once_each_gets_its_own_number() {
    let run = file_run();
    for store in [&memory_run(), &run.store] {
        let claimed: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| claim(store, None))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(claimed.iter().copied().collect::<BTreeSet<u32>>(), (1..=8).collect());
    }
}

#[test]
fn newest_first_by_number_not_by_text() {
    let store = memory_run();
    let attempt = claim(&store, None);
    for step in [5, 2_000_000_000, 999_999_999] {
        save(&store, attempt, step);
    }
    assert_eq!(steps(&store), [(2_000_000_000, 1), (999_999_999, 1), (5, 1)]);
}

#[test]
fn a_later_attempt_voids_commits_beyond_where_it_resumed() {
    let store = memory_run();
    let first = claim(&store, None);
    for step in [10, 20, 30] {
        save(&store, first, step);
    }
    let second = claim(&store, Some(20));
    assert_eq!(steps(&store), [(20, 1), (10, 1)]);
    save(&store, second, 25);
    assert_eq!(steps(&store), [(25, 2), (20, 1), (10, 1)]);
    let third = claim(&store, Some(10));
    assert_eq!(steps(&store), [(10, 1)]);
    // Step 20 was committed before, and is committed again by another attempt.
    save(&store, third, 20);
    assert_eq!(steps(&store), [(20, 3), (10, 1)]);
    claim(&store, None);
    assert_eq!(steps(&store), []);
}

#[test]
fn an_old_attempt_that_wakes_up_is_told_to_stop() {
    let store = memory_run();
    let first = claim(&store, None);
    save(&store, first, 10);
    let shards = write_all(&store, first, 20, 2, &small());
    let second = claim(&store, Some(10));
    let error = store.commit(content(first, 20, shards)).unwrap_err();
    assert!(
        matches!(error, CheckpointError::Fenced { attempt: 1, .. }) && error.to_string().contains("attempt 2"),
        "{error}"
    );
    assert_eq!(steps(&store), [(10, 1)]);
    save(&store, second, 15);
    assert_eq!(newest(&store), (Some(15), vec![]));
}

#[test]
fn a_late_commit_that_slips_through_is_ignored() {
    // The old attempt checks, the new one claims, the old one puts its manifest: played back by hand.
    let run = file_run();
    let first = claim(&run.store, None);
    save(&run.store, first, 10);
    let late = save(&run.store, first, 20).key();
    let bytes = fs::read(run.path.join(&late)).unwrap();
    fs::remove_file(run.path.join(&late)).unwrap();
    let second = claim(&run.store, Some(10));
    fs::write(run.path.join(&late), bytes).unwrap();
    assert_eq!(newest(&run.store), (Some(10), vec![]));
    save(&run.store, second, 20);
    assert_eq!(steps(&run.store), [(20, 2), (10, 1)]);
}

#[test]
fn a_damaged_step_can_be_committed_again() {
    let run = file_run();
    let first = claim(&run.store, None);
    save(&run.store, first, 10);
    let damaged = save(&run.store, first, 20);
    fs::write(run.path.join(&damaged.shards[0].key), b"gone").unwrap();
    assert_eq!(newest(&run.store), (Some(10), vec![20]));
    let second = claim(&run.store, Some(10));
    save(&run.store, second, 20);
    assert_eq!(newest(&run.store), (Some(20), vec![]));
    let (manifest, _) = run.store.newest_valid().unwrap().unwrap();
    assert_eq!((manifest.attempt, manifest.resumed_from), (2, Some(10)));
}

#[test]
fn manifests_make_up_for_lost_and_damaged_attempt_records() {
    let run = file_run();
    let first = claim(&run.store, None);
    for step in [10, 20, 30] {
        save(&run.store, first, step);
    }
    let second = claim(&run.store, Some(10));
    save(&run.store, second, 15);
    let expected = vec![(15, 2), (10, 1)];
    let record = run.path.join("attempts/0002.json");
    let text = fs::read_to_string(&record).unwrap();
    fs::write(&record, text.replace("\"resumed_from\":10", "\"resumed_from\":99")).unwrap();
    assert_eq!(steps(&run.store), expected);
    fs::remove_dir_all(run.path.join("attempts")).unwrap();
    assert_eq!(steps(&run.store), expected);
    assert_eq!(claim(&run.store, Some(15)), 3, "the numbers of committed attempts are taken");
}

#[test]
fn committing_the_same_again_is_success_and_other_content_is_not() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let shards = write_all(&store, attempt, 10, 2, &small());
    let manifest = store.commit(content(attempt, 10, shards.clone())).unwrap();
    assert_eq!(store.commit(content(attempt, 10, shards.clone())).unwrap(), manifest);
    let mut other = content(attempt, 10, shards);
    other.optimizer_step = 9;
    assert!(matches!(store.commit(other), Err(CheckpointError::Fenced { .. })));
    assert_eq!(store.newest_valid().unwrap().unwrap().0, manifest);
}

#[test]
fn only_a_claimed_attempt_commits() {
    let store = memory_run();
    assert!(
        matches!(try_save(&store, 1, 10), Err(CheckpointError::Missing { key, .. }) if key == "attempts/0001.json")
    );
}

#[test]
fn two_holders_of_one_number_are_noticed() {
    // What a store does whose create-if-absent lets two win: the second record replaces the first.
    let run = file_run();
    let attempt = claim(&run.store, None);
    let other = RunStore::open(run.path.to_str().unwrap()).unwrap();
    fs::remove_file(run.path.join("attempts/0001.json")).unwrap();
    assert_eq!(other.claim_attempt(&AttemptInfo::default()).unwrap(), attempt);
    assert!(matches!(try_save(&run.store, attempt, 10), Err(CheckpointError::Fenced { .. })));
    save(&other, attempt, 20);
}
