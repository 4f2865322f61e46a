//! A trace shows what every rank did, and that gradients are on the wire while the next segment computes.

use crate::damage::break_row_group;
use crate::experiment::{Experiment, run, run_ok, write_dataset};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// Begin and end of a rank's spans whose names begin so.
fn spans(trace: &[Value], rank: usize, name: &str) -> Vec<(f64, f64)> {
    let named = |event: &&Value| {
        event["ph"] == "X" && event["pid"] == rank && event["name"].as_str().unwrap().starts_with(name)
    };
    let times = |event: &Value| {
        let (ts, dur) = (event["ts"].as_f64().unwrap(), event["dur"].as_f64().unwrap());
        (ts, ts + dur)
    };
    trace.iter().filter(named).map(times).collect()
}

#[test]
fn a_trace_of_two_ranks_has_every_kind_of_work_and_reductions_begin_before_backward_ends() {
    let experiment = Experiment::new();
    let file = experiment.path("trace.json");
    // Checkpoints at 3 and 6: when the second begins the first has been uploaded.
    run_ok(experiment.launcher(2, "run", &[]).arg("--trace").arg(&file).args(["--trace-steps", "7"]));
    let trace: Vec<Value> = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    for rank in 0..2 {
        let names = trace.iter().filter(|event| event["pid"] == rank && event["name"] == "thread_name");
        let names: BTreeSet<&str> = names.map(|event| event["args"]["name"].as_str().unwrap()).collect();
        for track in ["compute", "wire", "data", "saver"] {
            assert!(names.contains(track), "rank {rank}: {names:?}");
        }
        let steps = spans(&trace, rank, "step ");
        assert_eq!(steps.len(), 7);
        let (backward, reduce) = (spans(&trace, rank, "backward of segment "), spans(&trace, rank, "reduce "));
        for name in
            ["forward of segment 0", "gather ", "update", "agree", "wait for data", "upload 3", "fill micro-batches"]
        {
            assert!(!spans(&trace, rank, name).is_empty(), "rank {rank} has no {name}");
        }
        for &(begin, end) in &steps {
            let within = |spans: &[(f64, f64)]| {
                spans.iter().copied().filter(|span| span.0 >= begin && span.0 <= end).collect::<Vec<_>>()
            };
            let first_reduce = within(&reduce).into_iter().map(|span| span.0).fold(f64::INFINITY, f64::min);
            let last_backward = within(&backward).into_iter().map(|span| span.0).fold(0.0, f64::max);
            assert!(first_reduce < last_backward, "rank {rank}: {first_reduce} {last_backward}");
        }
    }
    let overlap = |run: &str| {
        let steps = experiment.log(run).into_iter().filter(|event| event["event"] == "step");
        steps.map(|event| event["overlap"].as_f64()).collect::<Vec<_>>()
    };
    let shares = overlap("run");
    assert!(shares.iter().all(|share| share.is_some_and(|share| (0.0..=1.0).contains(&share))), "{shares:?}");
    experiment.train(1, "alone", &[]);
    assert_eq!(overlap("alone"), [None; 10]);
}

#[test]
fn a_run_that_fails_leaves_the_trace_until_there_and_a_later_start_another() {
    let experiment = Experiment::new();
    let file = experiment.path("trace.json");
    write_dataset(&experiment.path("data"), |row, mean| {
        if row == 60 {
            mean.fill(1e30);
        }
    });
    let traced = |name: &str, overrides: &[&str]| {
        run(experiment.launcher(2, name, overrides).arg("--trace").arg(&file).args(["--trace-steps", "100"]))
    };
    let read =
        |name: &str| -> Vec<Value> { serde_json::from_slice(&fs::read(experiment.path(name)).unwrap()).unwrap() };
    let steps = |trace: &[Value], rank| spans(trace, rank, "step ").len() as u64;
    // All ranks fail together, in the step after those that were made.
    assert_eq!(traced("run", &[]).code, Some(1));
    let made = experiment.steps_of_last_attempt("run").last().copied().unwrap_or(0);
    let failed = read("trace.json");
    assert_eq!([0, 1].map(|rank| steps(&failed, rank)), [made + 1; 2]);
    assert!(made == 0 || [0, 1].iter().all(|rank| !spans(&failed, *rank, "update").is_empty()));
    // The next start goes on and writes the file anew; the former one stays.
    assert_eq!(traced("run", &["divergence.policy=skip"]).code, Some(0));
    assert_eq!(read("trace.attempt-0001.json"), failed);
    assert_eq!(read("trace.attempt-0002.json"), read("trace.json"));
    assert_eq!(steps(&read("trace.json"), 1), experiment.steps_of_last_attempt("run").len() as u64);

    // What one rank alone knows of, it writes alone: a broken row group that only its lanes read.
    write_dataset(&experiment.path("data"), |_, _| {});
    break_row_group(&experiment);
    assert_eq!(traced("other", &[]).code, Some(1));
    let alone = ["trace.attempt-0001.rank-0.json", "trace.attempt-0001.rank-1.json"];
    let written: Vec<&str> = alone.into_iter().filter(|name| experiment.path(name).exists()).collect();
    assert!(!written.is_empty() && written.iter().all(|name| !read(name).is_empty()), "{written:?}");
}

#[test]
fn a_trace_that_cannot_be_written_is_refused_at_the_start() {
    let experiment = Experiment::new();
    let ran = run(experiment.launcher(2, "run", &[]).args(["--trace", "/nowhere/trace.json"]));
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    assert!(ran.text().contains("--trace: /nowhere/trace.json cannot be written"), "{}", ran.text());
    assert!(experiment.steps_of_last_attempt("run").is_empty());
    let ran = run(experiment.launcher(1, "run", &[]).args(["--trace", "t.json", "sample", "--num", "1"]));
    assert!(ran.code != Some(0) && ran.text().contains("--trace is for training"), "{}", ran.text());
}
