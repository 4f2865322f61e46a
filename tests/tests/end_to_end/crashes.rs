//! Killed at random moments, again and again, much of the time inside checkpoint writes.

use crate::experiment::{Experiment, finish, run, run_ok, start, wait_until};
use crate::stopping::{kill, ranks_of};
use data_loader::draws::{Key, Purpose};
use rand::RngExt;
use std::process::Command;
use std::time::Duration;

/// Kills of the default test; `DITHAROS_CRASHES` asks for more (`./dev test --crashes 200`).
const CRASHES: u64 = 10;
/// A checkpoint is on its way nearly all of the time.
const EAGER: [&str; 4] =
    ["train.steps=600", "checkpoint.every_steps=2", "checkpoint.keep_last=2", "log.every_steps=100"];

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn checkpoints(experiment: &Experiment, action: &[&str]) -> String {
    run_ok(Command::new(binary()).arg("checkpoints").arg(experiment.path("crashed")).args(action)).stdout
}

fn binary() -> std::path::PathBuf {
    crate::experiment::binary("trainer")
}

#[test]
fn whatever_is_killed_whenever_nothing_committed_is_lost_and_the_bits_are_the_same() {
    let experiment = Experiment::new();
    run_ok(&mut experiment.launcher(1, "reference", &EAGER));
    let folder = experiment.path("crashed");
    let folder = folder.to_str().unwrap();
    let commits = || std::fs::read_dir(experiment.path("crashed/checkpoints")).map_or(0, Iterator::count);

    let seed = number("DITHAROS_CRASH_SEED", std::process::id().into());
    let mut newest = 0;
    for crash in 0..number("DITHAROS_CRASHES", CRASHES) {
        let mut rng = Key::new(seed, Purpose::Init, crash).rng();
        let ranks = if rng.random_bool(0.5) { 2 } else { 1 };
        let child = start(&mut experiment.launcher(ranks, "crashed", &EAGER));
        if newest == 0 || rng.random_bool(0.8) {
            // Most of the kills are spread over the steps and the checkpoints, the rest over the start.
            wait_until("the ranks' start", || !ranks_of(folder).is_empty());
            let before = commits();
            wait_until("a sign of life", || commits() != before || ranks_of(folder).is_empty());
        }
        std::thread::sleep(Duration::from_millis(rng.random_range(0..400)));
        let mut victims = ranks_of(folder);
        if rng.random_bool(0.5) {
            victims.truncate(1);
        } else {
            victims.push(child.id() as i32);
        }
        victims.iter().for_each(|&pid| kill("-KILL", pid));
        let ran = finish(child);
        wait_until("the end of every rank", || ranks_of(folder).is_empty());
        let context = format!("seed {seed}, crash {crash}: {}", ran.text());
        if newest > 0 || commits() > 0 {
            let verified = run(Command::new(binary()).args(["checkpoints", folder, "verify"]));
            assert_eq!(verified.code, Some(0), "{context}\n{}", verified.text());
            let step = |line: &str| line.strip_prefix("step ")?.split_whitespace().next()?.parse().ok();
            let now: u64 = verified.stdout.lines().filter_map(step).max().unwrap_or(0);
            assert!(now >= newest, "{context}: step {newest} was committed, now the newest is {now}");
            newest = now;
        }
    }
    run_ok(&mut experiment.launcher(2, "crashed", &EAGER));
    assert_eq!(experiment.digest("crashed"), experiment.digest("reference"), "seed {seed}");
    checkpoints(&experiment, &["verify"]);
    checkpoints(&experiment, &["gc", "--stopped"]);
    assert_eq!(checkpoints(&experiment, &["gc", "--stopped", "--dry-run"]).trim(), "0 objects would be deleted");
    // Two steps of one manifest and two or fewer shards each, and nothing else.
    assert!(experiment.committed("crashed").len() <= 6, "{:?}", experiment.committed("crashed"));
}
