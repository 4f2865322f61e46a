//! `trainer doctor` and `launcher … doctor`.

use crate::experiment::{Experiment, binary, run, run_ok};
use serde_json::Value;
use std::process::Command;

fn said(text: &str) -> Value {
    let lines: String = text.lines().map(|line| line.strip_prefix("[rank 0] ").unwrap_or(line)).collect();
    serde_json::from_str(&lines).unwrap()
}

#[test]
fn a_machine_and_a_run_that_are_sound_are_called_so_by_one_process_and_by_all_ranks() {
    let experiment = Experiment::new();
    let alone = run_ok(Command::new(binary("trainer")).arg("doctor")).stdout;
    for what in ["ok       libtorch: ", "ok       GPU: ", "ok       memory: ", "ok       mpirun: "] {
        assert!(alone.contains(what), "{what} in {alone}");
    }
    let mut launcher = experiment.launcher(2, "run", &[]);
    let all = said(&run_ok(launcher.args(["doctor", "--json"])).stdout);
    assert_eq!((&all["problems"], &all["world_size"]), (&0.into(), &2.into()));
    for rank in all["ranks"].as_array().unwrap() {
        let names: Vec<&str> =
            rank["findings"].as_array().unwrap().iter().map(|found| found["what"].as_str().unwrap()).collect();
        assert_eq!(
            names,
            ["libtorch", "GPU", "threads", "memory", "data", "store", "disk", "programs", "clocks", "network"]
        );
    }
    // Nothing is left of what was tried.
    let left: Vec<_> = std::fs::read_dir(experiment.path("run/probes")).into_iter().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn every_problem_is_named_with_a_remedy_and_a_code() {
    let experiment = Experiment::new();
    std::fs::write(experiment.path("file"), "").unwrap();
    std::fs::write(experiment.path("data/part-00000-of-00001.parquet"), "PAR1 but no more").unwrap();
    let mut launcher = experiment.launcher(2, "file/run", &["train.threads_per_rank=999"]);
    let ran = run(launcher.arg("doctor"));
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    for (what, more) in [
        ("problem  threads (rank 0): 2 rank(s) × 999", "remedy: start fewer ranks"),
        ("problem  data (rank 1): ", "part-00000-of-00001.parquet"),
        ("problem  store (rank 1): ", "file/run"),
    ] {
        let line = ran.stdout.lines().find(|line| line.contains(what));
        assert!(line.is_some_and(|line| line.contains(more)), "{what}: {}", ran.text());
    }
    assert!(ran.stderr.contains("6 problem(s) found"), "{}", ran.text());
}
