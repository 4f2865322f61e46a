//! Steps that diverge: the run stops, passes them over, or rolls back and leaves lanes out; the same bits on any ranks, killed
//! or not.

use crate::experiment::{Experiment, STEPS, binary, run, run_ok, write_dataset};
use serde_json::{Value, json};
use std::fs;
use std::process::Command;
use tch::Tensor;

/// A row with other numbers than the rest.
const ROW: usize = 60;
const OFTEN: [&str; 3] = ["checkpoint.every_steps=2", "checkpoint.keep_last=9", "log.tensorboard=false"];
const SKIP: &str = "divergence.policy=skip";
const ROLLBACK: &str = "divergence.policy=rollback";

/// All numbers of the row are `value`, so that a step in which it is read diverges.
fn with_row_of(value: f32) -> Experiment {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |row, mean| {
        if row == ROW {
            mean.fill(value);
        }
    });
    experiment
}

fn diverged(experiment: &Experiment, run: &str) -> Vec<Value> {
    experiment.log(run).into_iter().filter(|event| event["event"] == "diverged").collect()
}

fn starts(experiment: &Experiment, run: &str) -> Vec<Value> {
    let starts = experiment.log(run).into_iter().filter(|event| event["event"] == "start");
    starts.map(|event| event["resumed_from"].clone()).collect()
}

/// Digests and decisions at the end.
fn end(experiment: &Experiment, run: &str) -> (Vec<String>, Value) {
    (experiment.digest(run), experiment.manifest(run, STEPS)["decision_log"].clone())
}

/// Runs on any ranks, shared out in any way, killed before or after what happened, end as the first one did. Gives its end.
fn the_same_on_any_ranks_and_after_a_kill(
    experiment: &Experiment,
    name: &str,
    policy: &[&str],
) -> (Vec<String>, Value) {
    let train = |ranks, run: &str, further: &[&str]| {
        experiment.train(ranks, run, &[&OFTEN[..], policy, further].concat());
        end(experiment, run)
    };
    let alone = format!("{name}-alone");
    let expected = train(1, &alone, &[]);
    let first = diverged(experiment, &alone)[0]["step"].as_u64().unwrap();
    for (number, (ranks, how)) in
        [(2, "train.sharding=2"), (4, "train.sharding=3"), (4, "train.sharding=0")].into_iter().enumerate()
    {
        let found = train(ranks, &format!("{name}-{number}"), &[how]);
        assert_eq!(found, expected, "{ranks} ranks, {how}");
    }
    // As if killed before anything of it was committed, and after; another number of ranks goes on.
    for (killed_after, ranks) in [((first - 1) / 2 * 2, 4), (first.next_multiple_of(2), 2)] {
        for later in (killed_after + 1..=STEPS).filter(|later| later.is_multiple_of(2)) {
            fs::remove_dir_all(experiment.path(&format!("{alone}/checkpoints/step-{later:09}"))).unwrap();
        }
        assert_eq!(train(ranks, &alone, &[]), expected, "killed after step {killed_after}");
    }
    expected
}

#[test]
fn a_step_that_is_not_finite_is_skipped_with_the_same_bits_on_any_ranks_and_after_a_kill() {
    let experiment = with_row_of(1e30);
    let (digest, decisions) = the_same_on_any_ranks_and_after_a_kill(&experiment, "skip", &[SKIP]);
    let skipped = decisions.as_array().unwrap();
    assert!(!skipped.is_empty() && skipped.iter().all(|entry| entry["kind"] == "step_skipped"), "{decisions}");
    let manifest = experiment.manifest("skip-alone", STEPS);
    assert_eq!(manifest["optimizer_step"], STEPS - skipped.len() as u64);
    let told = diverged(&experiment, "skip-0");
    for (entry, event) in skipped.iter().zip(&told) {
        assert_eq!(
            (&entry["step"], &entry["reason"], "skip"),
            (&event["step"], &event["reason"], event["action"].as_str().unwrap())
        );
    }
    assert_eq!((told.len(), starts(&experiment, "skip-0").len()), (skipped.len(), 1));
    // Without the rest of the row's lane: the weights are those of a step that was not made.
    let before = format!("train.steps={}", skipped[0]["step"].as_u64().unwrap() - 1);
    let until = format!("train.steps={}", skipped[0]["step"]);
    let state = |run: &str, steps: &str| {
        run_ok(&mut experiment.launcher(1, run, &[OFTEN[0], SKIP, steps]));
        experiment.digest(run)[..3].to_vec()
    };
    assert_eq!(state("before", &before), state("until", &until), "weights, averages or moments were touched");
    let list = run_ok(
        std::process::Command::new(crate::experiment::binary("trainer"))
            .arg("checkpoints")
            .arg(experiment.path("skip-0"))
            .args(["list", "--json"]),
    );
    let newest: Value = serde_json::from_str(list.stdout.lines().next().unwrap()).unwrap();
    assert_eq!(newest["decision_log"], decisions);
    let sound = Experiment::new();
    sound.train(1, "run", &OFTEN);
    assert_ne!(sound.digest("run")[0], digest[0]);
}

#[test]
fn a_rollback_leaves_the_lane_out_with_the_same_bits_on_any_ranks_and_after_a_kill() {
    let experiment = with_row_of(1e30);
    let (digest, decisions) = the_same_on_any_ranks_and_after_a_kill(&experiment, "back", &[ROLLBACK]);
    let left_out = decisions.as_array().unwrap();
    assert!(left_out.iter().all(|entry| entry["kind"] == "lanes_left_out"), "{decisions}");
    assert!(left_out.iter().all(|entry| entry["lanes"].as_array().unwrap().len() == 1), "{decisions}");
    // Every step is made, by the other lanes.
    assert_eq!(experiment.manifest("back-0", STEPS)["optimizer_step"], STEPS);
    let (told, starts) = (diverged(&experiment, "back-0"), starts(&experiment, "back-0"));
    assert_eq!((told.len(), starts.len()), (left_out.len(), left_out.len() + 1));
    for (event, resumed_from) in told.iter().zip(&starts[1..]) {
        let newest = (event["step"].as_u64().unwrap() - 1) / 2 * 2;
        assert_eq!(*resumed_from, if newest == 0 { json!(null) } else { json!(newest) });
        assert_eq!(event["action"], "rollback");
    }
    // With no checkpoint to go back to it begins again.
    experiment.train(2, "from-nothing", &["checkpoint.every_steps=100", ROLLBACK]);
    assert_eq!(end(&experiment, "from-nothing"), (digest, decisions));
}

#[test]
fn a_loss_that_leaps_is_passed_over_with_the_same_bits_on_any_ranks_and_after_a_kill() {
    let experiment = with_row_of(30.0);
    let leap = ["diffusion.objective=x_start", "divergence.loss_spike=3.0", "divergence.window=2"];
    let mut ends = Vec::new();
    for (name, policy) in [("skip", SKIP), ("back", ROLLBACK)] {
        let found = the_same_on_any_ranks_and_after_a_kill(&experiment, name, &[policy, leap[0], leap[1], leap[2]]);
        let told = diverged(&experiment, &format!("{name}-0"));
        assert!(told.iter().all(|event| event["reason"].as_str().unwrap().contains("the loss leaps to")), "{told:?}");
        ends.push(found.0);
    }
    // Without the policy the run takes such a loss as it is; with it alone it ends.
    experiment.train(1, "taken", &[&OFTEN[..], &leap[..1]].concat());
    ends.push(experiment.digest("taken"));
    ends.sort();
    ends.dedup();
    assert_eq!(ends.len(), 3);
    let ran = run(&mut experiment.launcher(2, "ended", &[&OFTEN[..], &leap].concat()));
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    assert!(ran.stderr.contains("the loss leaps to"), "{}", ran.text());
}

#[test]
fn what_stops_a_run_names_rank_host_lane_and_step_in_the_message_and_the_log() {
    let experiment = with_row_of(1e30);
    let ran = run(&mut experiment.launcher(4, "run", &OFTEN));
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    let told = diverged(&experiment, "run");
    let (event, at_fault) = (&told[0], &told[0]["lanes"][0]);
    assert_eq!((told.len(), &event["action"], &event["phase"]), (1, &json!("stop"), &json!("forward")));
    // Four lanes on four ranks.
    assert_eq!(at_fault["rank"], at_fault["lane"]);
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
    assert_eq!(at_fault["host"], host.trim());
    let (rank, step) = (&at_fault["rank"], &event["step"]);
    let says = format!("host {}, step {step}, phase forward: {}", host.trim(), event["reason"].as_str().unwrap());
    for says in [format!("rank {rank}: {says}"), format!("launcher: rank {rank} failed"), format!(": {says}")] {
        assert!(ran.stderr.contains(&says), "`{says}` is not said: {}", ran.text());
    }
    // The policy may be given on the way.
    experiment.train(2, "run", &[&OFTEN[..], &[SKIP]].concat());
    experiment.train(1, "other", &[&OFTEN[..], &[SKIP]].concat());
    assert_eq!(end(&experiment, "run"), end(&experiment, "other"));
}

#[test]
fn a_run_that_diverges_too_often_ends_with_the_evidence() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |_, mean| mean.fill(1e30));
    for policy in [SKIP, ROLLBACK] {
        let run_folder = policy.replace('=', "-");
        let ran =
            run(&mut experiment.launcher(2, &run_folder, &[policy, "divergence.budget=2", "log.tensorboard=false"]));
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        for says in ["allows 2 exceptions, and these are 3", "step 1 (the loss is not finite", "step 2 (", "step 3 ("] {
            assert!(ran.stderr.contains(says), "{policy}: `{says}` is not said: {}", ran.text());
        }
        let actions: Vec<Value> =
            diverged(&experiment, &run_folder).iter().map(|event| event["action"].clone()).collect();
        let passed = policy.rsplit_once('=').unwrap().1;
        assert_eq!(actions, [passed, passed, "stop"]);
        assert!(experiment.committed(&run_folder).is_empty());
    }
}

#[test]
fn fast_sums_pass_over_what_diverges_too() {
    let experiment = with_row_of(1e30);
    for (policy, sharding) in [(SKIP, "train.sharding=1"), (ROLLBACK, "train.sharding=3")] {
        let overrides = [&OFTEN[..], &["reduction=fast", policy, sharding]].concat();
        let ends = ["a", "b"].map(|again| {
            let name = format!("{}-{again}", policy.replace('=', "-"));
            experiment.train(2, &name, &overrides);
            end(&experiment, &name)
        });
        assert_eq!(ends[0], ends[1]);
        // What is decided does not depend on how gradients are added.
        experiment.train(1, &format!("{policy}-invariant"), &[&OFTEN[..], &[policy]].concat());
        assert_eq!(ends[0].1, end(&experiment, &format!("{policy}-invariant")).1);
    }
}

/// Weights of which every loss is finite, while gradients of the embedders are not: nothing of the conditioning comes through, but what
/// goes back to it is multiplied by numbers that are far too large.
fn exploding_backwards(experiment: &Experiment) -> String {
    experiment.train(1, "base", &[]);
    let file = experiment.path("exploding.safetensors");
    let mut export = Command::new(binary("trainer"));
    export.args(["export", "--weights", "model", "--format", "safetensors", "--checkpoint"]);
    run_ok(export.arg(experiment.path("base")).arg("--out").arg(&file));
    let spoilt = |(name, weight): (String, Tensor)| {
        let weight = match name.as_str() {
            "t_embedder.mlp.2.weight" | "t_embedder.mlp.2.bias" | "y_embedder.embedding_table.weight" => {
                weight.zeros_like()
            }
            "final_layer.linear.weight" => weight.full_like(1e12),
            "final_layer.adaLN_modulation.1.weight" => weight.full_like(1e30),
            _ => weight,
        };
        (name, weight)
    };
    let weights: Vec<_> = Tensor::read_safetensors(&file).unwrap().into_iter().map(spoilt).collect();
    Tensor::write_safetensors(&weights, &file).unwrap();
    format!("init.from={:?}", file.to_str().unwrap())
}

#[test]
fn a_gradient_that_is_not_finite_where_every_loss_is_is_named_by_its_segment_on_any_ranks() {
    let experiment = Experiment::new();
    let from = exploding_backwards(&experiment);
    let mut reasons = Vec::new();
    let back: &[&str] = &[ROLLBACK, "divergence.budget=1"];
    for (ranks, policy) in [(1, &[][..]), (2, &[]), (4, back)] {
        let folder = format!("{ranks}");
        let overrides = [&[&*from, "log.tensorboard=false"], policy].concat();
        let ran = run(&mut experiment.launcher(ranks, &folder, &overrides));
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        let says = "phase backward: the gradient in the segment of `x_embedder.proj.weight` is not finite";
        assert!(ran.stderr.contains(says), "`{says}` is not said: {}", ran.text());
        assert!(experiment.committed(&folder).is_empty());
        let told = diverged(&experiment, &folder);
        // What is rolled back is begun again without step 1, and comes to the same with step 2.
        assert_eq!(told.len(), if policy == back { 2 } else { 1 }, "{told:?}");
        assert_eq!((&told[0]["step"], &told[0]["lanes"]), (&json!(1), &json!([])), "{told:?}");
        reasons.push(told[0]["reason"].clone());
    }
    assert!(reasons.iter().all(|reason| *reason == reasons[0]), "{reasons:?}");
}
