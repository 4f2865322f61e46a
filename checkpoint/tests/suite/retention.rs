//! Deleting old checkpoints.

use crate::world::*;
use checkpoint::{CheckpointError, Metric, Retention, RunStore};
use std::fs;

#[test]
fn the_newest_are_kept_and_the_rest_leaves_no_trace() {
    let run = file_run();
    for store in [&memory_run(), &run.store] {
        let attempt = claim(store, None);
        write_all(store, attempt, 5, 2, &small());
        (1..=5).for_each(|i| drop(save(store, attempt, i * 10)));
        assert_eq!(store.retain(&Retention::last(3)).unwrap(), [5, 10, 20]);
        let left: Vec<u64> = store.committed().unwrap().iter().map(|commit| commit.step).collect();
        assert_eq!(left, [50, 40, 30]);
        for commit in store.committed().unwrap() {
            store.verify(&store.manifest(&commit).unwrap()).unwrap();
        }
        assert_eq!(store.retain(&Retention::last(3)).unwrap(), [0u64; 0]);
    }
    assert_eq!(files(&run.path).len(), 1 + 3 * 3, "one attempt, two shards and a manifest of three steps");
    assert_eq!(fs::read_dir(run.path.join("checkpoints")).unwrap().count(), 3);
}

#[test]
fn at_least_two_are_kept() {
    let store = memory_run();
    let attempt = claim(&store, None);
    (1..=2).for_each(|step| drop(save(&store, attempt, step)));
    assert_eq!(store.retain(&Retention::last(2)).unwrap(), [0u64; 0]);
    for keep_last in [0, 1] {
        assert!(matches!(store.retain(&Retention::last(keep_last)), Err(CheckpointError::KeepTooFew { .. })));
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
    let error = run.store.retain(&Retention::last(2)).unwrap_err();
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
    assert_eq!(store.retain(&Retention::last(2)).unwrap(), [10]);
    assert_eq!(newest(&store), (Some(25), vec![]));
}

#[test]
fn a_crash_between_manifest_and_shards_is_cleaned_up_next_time() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let manifests: Vec<_> = (1..=4).map(|step| save(&run.store, attempt, step)).collect();
    fs::remove_file(run.path.join(manifests[0].key())).unwrap();
    assert_eq!(run.store.retain(&Retention::last(3)).unwrap(), [1]);
    assert_eq!(files(&run.path).len(), 1 + 3 * 3);
}

fn lowest(name: &str) -> Metric {
    Metric { name: name.to_owned(), higher_is_better: false }
}

fn best(count: usize, metric: Metric) -> Retention {
    Retention { keep_best: Some((count, metric)), ..Retention::last(2) }
}

fn steps(store: &RunStore) -> Vec<u64> {
    store.committed().unwrap().iter().map(|commit| commit.step).collect()
}

#[test]
fn every_nth_step_is_kept_for_ever() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let retention = Retention { keep_every: 20, ..Retention::last(2) };
    for step in (1..=8).map(|i| i * 10) {
        save(&store, attempt, step);
        store.retain(&retention).unwrap();
    }
    assert_eq!(steps(&store), [80, 70, 60, 40, 20]);
}

#[test]
fn the_best_are_kept_whichever_way_the_metric_points_and_can_be_found() {
    let losses = [0.5, 0.2, 0.9, 0.3, 0.4, 0.8, 0.7];
    for (higher_is_better, kept, first) in [(false, [70, 60, 40, 20], 20), (true, [70, 60, 30, 10], 30)] {
        let store = memory_run();
        let attempt = claim(&store, None);
        let metric = Metric { name: "m/ema".to_owned(), higher_is_better };
        // The newest two compete for being the best like all others.
        let count = if higher_is_better { 4 } else { 2 };
        for (i, loss) in losses.iter().enumerate() {
            save_measured(&store, attempt, 10 * (i as u64 + 1), &[("m/ema", *loss), ("m/model", 1.0 - loss)]);
            store.retain(&best(count, metric.clone())).unwrap();
        }
        assert_eq!(steps(&store), kept, "higher is better: {higher_is_better}");
        let (manifest, damaged) = store.best_valid(&metric).unwrap().unwrap();
        assert_eq!((manifest.step, damaged.len()), (first, 0));
        assert_eq!(manifest.metrics["m/ema"], losses[first as usize / 10 - 1]);
        assert_eq!(store.metric_names().unwrap(), ["m/ema", "m/model"]);
        assert_eq!(store.best_valid(&lowest("fid")).unwrap(), None);
    }
}

#[test]
fn a_checkpoint_without_the_metric_is_never_the_best_and_of_equal_ones_the_later_is() {
    let store = memory_run();
    let attempt = claim(&store, None);
    for (step, loss) in [(1, Some(0.5)), (2, None), (3, Some(0.5)), (4, Some(0.7)), (5, None), (6, None)] {
        save_measured(&store, attempt, step, &loss.map(|loss| ("loss", loss)).into_iter().collect::<Vec<_>>());
    }
    assert_eq!(store.retain(&best(1, lowest("loss"))).unwrap(), [1, 2, 4]);
    assert_eq!(steps(&store), [6, 5, 3]);
}

#[test]
fn the_best_of_a_dead_branch_does_not_count() {
    let store = memory_run();
    let first = claim(&store, None);
    for (step, loss) in [(10, 0.5), (20, 0.4), (30, 0.1)] {
        save_measured(&store, first, step, &[("loss", loss)]);
    }
    let second = claim(&store, Some(20));
    for (step, loss) in [(40, 0.6), (50, 0.7)] {
        save_measured(&store, second, step, &[("loss", loss)]);
    }
    assert_eq!(store.best_valid(&lowest("loss")).unwrap().unwrap().0.step, 20);
    assert_eq!(store.retain(&best(1, lowest("loss"))).unwrap(), [10, 30]);
}

#[test]
fn a_damaged_best_is_passed_over_by_name_and_one_whose_manifest_is_damaged_is_not_deleted() {
    let run = file_run();
    let attempt = claim(&run.store, None);
    let losses = [0.1, 0.2, 0.3, 0.9, 0.8];
    let save = |(i, loss): (usize, &f64)| save_measured(&run.store, attempt, i as u64 + 1, &[("loss", *loss)]);
    let manifests: Vec<_> = losses.iter().enumerate().map(save).collect();
    fs::write(run.path.join(manifests[0].key()), "{}").unwrap();
    fs::write(run.path.join(&manifests[1].shards[0].key), "").unwrap();
    let store = RunStore::open(run.path.to_str().unwrap()).unwrap();
    let (found, damaged) = store.best_valid(&lowest("loss")).unwrap().unwrap();
    assert_eq!((found.step, damaged.iter().map(|d| d.step).collect::<Vec<_>>()), (3, vec![2]));
    assert!(damaged[0].reason.contains(&manifests[1].shards[0].key), "{}", damaged[0]);
    assert_eq!(store.retain(&best(2, lowest("loss"))).unwrap(), [0u64; 0]);
    assert_eq!(store.retain(&best(1, lowest("loss"))).unwrap(), [3]);
}

#[test]
fn a_metric_that_is_no_number_is_not_committed() {
    let store = memory_run();
    let attempt = claim(&store, None);
    let error = try_save_measured(&store, attempt, 1, &[("loss", f64::NAN)]).unwrap_err();
    assert!(matches!(error, CheckpointError::Incomplete { .. }) && error.to_string().contains("`loss`"), "{error}");
    assert_eq!(steps(&store), [0u64; 0]);
}
