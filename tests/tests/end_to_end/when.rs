//! When checkpoints are made: by the clock, on request, as often as the store takes them, and before time runs out.

use crate::experiment::{Experiment, finish, run, run_ok, start, wait_until};
use crate::stopping::{has_checkpoint, kill, long_reference, ranks_of};
use std::process::Command;

/// Enough steps for many checkpoints.
const STEPS: &str = "train.steps=120";

fn reference(experiment: &Experiment) -> Vec<String> {
    run_ok(&mut experiment.launcher(1, "reference", &[STEPS, "checkpoint.every_steps=1000"]));
    experiment.digest("reference")
}

fn checkpoint_steps(experiment: &Experiment, run: &str) -> Vec<u64> {
    let log = experiment.log(run);
    log.iter().filter(|event| event["event"] == "checkpoint").map(|event| event["step"].as_u64().unwrap()).collect()
}

#[test]
fn by_the_clock_all_ranks_save_after_the_same_step_and_the_bits_are_the_same() {
    let experiment = Experiment::new();
    let reference = reference(&experiment);
    // Rank 0's clock is the only one that counts; every commit proves that the others had saved the same step.
    let by_clock = ["checkpoint.every_steps=0", "checkpoint.every_minutes=0.002", "checkpoint.keep_last=1000"];
    run_ok(&mut experiment.launcher(2, "run", &[&[STEPS], &by_clock[..]].concat()));
    assert_eq!(experiment.digest("run"), reference);
    let steps = checkpoint_steps(&experiment, "run");
    assert!(steps.len() > 2 && steps.windows(2).all(|w| w[0] < w[1]) && steps.last() == Some(&120), "{steps:?}");
}

#[test]
fn a_request_gets_a_checkpoint_and_the_run_goes_on() {
    let experiment = Experiment::new();
    let endless = ["train.steps=1000000", "checkpoint.every_steps=1000000", "log.every_steps=50"];
    let child = start(&mut experiment.launcher(2, "run", &endless));
    wait_until("a step", || experiment.log("run").iter().any(|event| event["event"] == "step"));
    let trainer = crate::experiment::binary("trainer");
    let ask = |wait: &str| {
        run_ok(Command::new(&trainer).arg("checkpoints").arg(experiment.path("run")).args(["request", "--wait", wait]))
    };
    let first = ask("60");
    let steps = checkpoint_steps(&experiment, "run");
    assert!(first.stdout.contains(&format!("committed: step {}", steps[0])), "{steps:?} {}", first.text());
    // A file made by hand is a request, too.
    std::fs::write(experiment.path("run/requests/now"), "").unwrap();
    wait_until("the second", || checkpoint_steps(&experiment, "run").len() == 2);
    wait_until("the answer", || !experiment.path("run/requests/now").exists());
    kill("-TERM", child.id() as i32);
    assert_eq!(finish(child).code, Some(75));
    assert_eq!(checkpoint_steps(&experiment, "run").len(), 3, "two requests and the stop");
    // Nobody trains any more: the request stays, and the next start answers it.
    let unanswered =
        run(Command::new(&trainer).arg("checkpoints").arg(experiment.path("run")).args(["request", "--wait", "0"]));
    assert!(unanswered.code == Some(1) && unanswered.stderr.contains("no checkpoint was committed within 0 s"));
    assert_eq!(std::fs::read_dir(experiment.path("run/requests")).unwrap().count(), 1);
}

#[test]
fn checkpoints_that_come_too_fast_are_skipped_by_agreement_but_never_the_last_one() {
    let experiment = Experiment::new();
    let reference = reference(&experiment);
    let eager = ["checkpoint.every_steps=1", "checkpoint.when_busy=skip", "checkpoint.keep_last=1000"];
    run_ok(&mut experiment.launcher(2, "run", &[&[STEPS], &eager[..]].concat()));
    assert_eq!(experiment.digest("run"), reference);
    let skipped: Vec<u64> = experiment
        .log("run")
        .iter()
        .filter(|event| event["event"] == "checkpoint_skipped")
        .map(|event| {
            assert!(event["under_way"].as_u64() < event["step"].as_u64(), "{event}");
            event["step"].as_u64().unwrap()
        })
        .collect();
    let mut all = [skipped.clone(), checkpoint_steps(&experiment, "run")].concat();
    all.sort();
    // The step after a save is never free: a commit takes two agreements.
    assert!(skipped.len() >= 59 && !skipped.contains(&120), "{skipped:?}");
    assert_eq!(all, (1..=120).collect::<Vec<u64>>(), "every step is saved or said to be skipped");
}

#[test]
fn a_stop_that_cannot_be_saved_within_its_grace_period_ends_the_run_which_resumes() {
    let experiment = Experiment::new();
    let reference = long_reference(&experiment);
    let overrides = ["train.steps=400", "checkpoint.every_steps=20", "checkpoint.grace_s=2"];
    let child = start(&mut experiment.launcher(2, "run", &overrides));
    wait_until("a checkpoint", || has_checkpoint(&experiment, "run"));
    let folder = experiment.path("run");
    let ranks = ranks_of(folder.to_str().unwrap());
    // Either rank hangs, as on a dead disk: nothing more can be agreed on.
    kill("-STOP", ranks.iter().copied().max().expect("two ranks are running"));
    kill("-TERM", child.id() as i32);
    let ran = finish(child);
    assert!(!matches!(ran.code, Some(0) | Some(75)), "{}", ran.text());
    assert!(ran.text().contains("checkpoint.grace_s = 2 s"), "{}", ran.text());
    wait_until("the end of every rank", || ranks_of(folder.to_str().unwrap()).is_empty());
    run_ok(&mut experiment.launcher(1, "run", &overrides));
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
fn of_two_live_runs_on_one_folder_the_older_one_notices_and_stops() {
    let experiment = Experiment::new();
    let long = ["train.steps=1000", "checkpoint.every_steps=50", "checkpoint.keep_last=1000", "log.every_steps=500"];
    run_ok(&mut experiment.launcher(1, "reference", &long));
    let older = start(&mut experiment.launcher(2, "run", &long));
    wait_until("a checkpoint", || has_checkpoint(&experiment, "run"));
    let newer = run(&mut experiment.launcher(1, "run", &long));
    let older = finish(older);
    assert!(!matches!(older.code, Some(0) | Some(75)), "{}", older.text());
    let says = ["attempt 1 has lost the run", "attempts/0002.json", "stop this process, the other one continues"];
    assert!(says.iter().all(|text| older.text().contains(text)), "{}", older.text());
    assert_eq!(newer.code, Some(0), "{}", newer.text());
    assert_eq!(experiment.digest("run"), experiment.digest("reference"));
    let starts = experiment.log("run").into_iter().filter(|event| event["event"] == "start");
    let resumed: Vec<_> = starts.map(|event| event["resumed_from"].as_u64()).collect();
    assert!(resumed.len() == 2 && resumed[1].is_some_and(|step| step < 1000), "both were live: {resumed:?}");
}
