//! Killed, stopped, and resumed on another number of ranks: nothing is lost and the bits are the same.

use crate::experiment::{Experiment, finish, run, start, wait_until};
use std::process::Command;

/// A run that takes long enough to be interrupted in the middle: the tiny experiment with many more steps.
const LONG: [&str; 3] = ["train.steps=400", "checkpoint.every_steps=20", "log.every_steps=5"];

pub fn long_reference(experiment: &Experiment) -> Vec<String> {
    let ran = run(&mut experiment.launcher(1, "reference", &LONG));
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    experiment.digest("reference")
}

/// The process ids of the ranks that train in `run`.
pub fn ranks_of(run: &str) -> Vec<i32> {
    let found = Command::new("pgrep").args(["-f", &format!("trainer train .*{run}")]).output().unwrap();
    String::from_utf8_lossy(&found.stdout).lines().filter_map(|line| line.parse().ok()).collect()
}

pub fn has_checkpoint(experiment: &Experiment, run: &str) -> bool {
    experiment.log(run).iter().any(|event| event["event"] == "checkpoint")
}

pub fn kill(signal: &str, pid: i32) {
    Command::new("kill").args([signal, &pid.to_string()]).status().unwrap();
}

#[test]
fn a_killed_rank_ends_the_run_by_name_and_the_same_command_resumes_to_the_same_bits() {
    let experiment = Experiment::new();
    let reference = long_reference(&experiment);
    let run_folder = experiment.path("killed");
    let child = start(&mut experiment.launcher(2, "killed", &LONG));
    wait_until("a checkpoint", || has_checkpoint(&experiment, "killed"));
    let ranks = ranks_of(run_folder.to_str().unwrap());
    let victim = ranks.iter().copied().max().expect("two ranks are running");
    kill("-KILL", victim);
    let ran = finish(child);
    assert!(ran.code != Some(0) && ran.code != Some(75), "{}", ran.text());
    assert!(ran.text().contains("rank 0") || ran.text().contains("rank 1"), "no rank is named: {}", ran.text());
    assert!(ran.text().contains("signal 9"), "the cause is not named: {}", ran.text());
    wait_until("the end of every rank", || ranks_of(run_folder.to_str().unwrap()).is_empty());

    let ran = run(&mut experiment.launcher(4, "killed", &LONG));
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    assert_eq!(experiment.digest("killed"), reference);
    let starts: Vec<_> = experiment.log("killed").into_iter().filter(|event| event["event"] == "start").collect();
    assert_eq!(starts.len(), 2);
    assert_eq!((&starts[1]["attempt"], &starts[1]["world_size"]), (&2.into(), &4.into()));
    let resumed_from = starts[1]["resumed_from"].as_u64().expect("the second start continues a checkpoint");
    assert!(resumed_from >= 20 && resumed_from % 20 == 0, "{resumed_from}");
    assert!(experiment.steps_of_last_attempt("killed").iter().all(|&step| step > resumed_from));
}

#[test]
fn sigterm_saves_and_exits_75_and_the_run_goes_on_from_there() {
    let experiment = Experiment::new();
    let reference = long_reference(&experiment);
    let overrides = [LONG[0], "checkpoint.every_steps=1000", LONG[2]];
    let child = start(&mut experiment.launcher(2, "stopped", &overrides));
    wait_until("a step", || experiment.log("stopped").iter().any(|event| event["event"] == "step"));
    kill("-TERM", child.id() as i32);
    let ran = finish(child);
    assert_eq!(ran.code, Some(75), "{}", ran.text());
    let log = experiment.log("stopped");
    let stop = log.iter().find(|event| event["event"] == "stop").expect("a stop event");
    let saved = experiment.digest("stopped")[3].clone();
    assert_eq!(saved, format!("step {}", stop["step"]));

    let ran = run(&mut experiment.launcher(1, "stopped", &overrides));
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    let log = experiment.log("stopped");
    let resumed = log.iter().rfind(|event| event["event"] == "start").unwrap();
    assert_eq!(resumed["resumed_from"], stop["step"]);
    assert_eq!(experiment.digest("stopped"), reference);
}

#[test]
fn a_finished_run_is_not_trained_again() {
    let experiment = Experiment::new();
    experiment.train(2, "run", &[]);
    let before = experiment.committed("run");
    experiment.train(1, "run", &[]);
    assert_eq!(experiment.committed("run"), before);
    assert_eq!(experiment.steps_of_last_attempt("run"), [] as [u64; 0]);
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let experiment = Experiment::new();
    experiment.train(2, "run", &["checkpoint.every_steps=1", "checkpoint.keep_last=2"]);
    let kept = std::fs::read_dir(experiment.path("run/checkpoints")).unwrap();
    let mut kept: Vec<String> = kept.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    kept.sort();
    assert_eq!(kept, ["step-000000009", "step-000000010"]);
}
