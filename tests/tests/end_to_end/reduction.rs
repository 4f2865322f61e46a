//! Sums of gradients that the backend makes: near those of the canonical tree, and the same again on the same ranks.

use crate::experiment::{Experiment, STEPS, run, run_ok};
use serde_json::{Value, json};
use std::fs;

const FAST: &str = "reduction=fast";

fn losses(experiment: &Experiment, run: &str) -> Vec<f64> {
    let steps = experiment.log(run).into_iter().filter(|event| event["event"] == "step");
    steps.map(|event| event["loss"].as_f64().unwrap()).collect()
}

#[test]
fn fast_sums_are_near_invariant_ones_and_the_same_again_on_the_same_ranks() {
    let experiment = Experiment::new();
    let lanes = "train.lanes=8";
    experiment.train(2, "invariant", &[lanes]);
    let expected = losses(&experiment, "invariant");
    let mut digests = Vec::new();
    for (run, ranks, further, tolerance) in [
        ("fast", 2, &[][..], 1e-4),
        ("fast-again", 2, &[], 1e-4),
        ("fast-4", 4, &[], 1e-4),
        ("bf16", 2, &["reduction_dtype=bf16"], 2e-2),
        ("bf16-again", 2, &["reduction_dtype=bf16"], 2e-2),
    ] {
        experiment.train(ranks, run, &[&[lanes, FAST], further].concat());
        let found = losses(&experiment, run);
        assert_eq!(found.len() as u64, STEPS);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= tolerance * expected, "{run}: {found}, invariant {expected}");
        }
        digests.push(experiment.digest(run));
    }
    let [fast, again, _, bf16, bf16_again] = &digests[..] else { panic!("{digests:?}") };
    assert_eq!(fast, again);
    assert_eq!(bf16, bf16_again);
    assert_ne!(fast, bf16, "bf16 must round");
}

#[test]
fn fast_sums_take_any_number_of_lanes_and_the_manifest_says_which_ranks_made_which_steps() {
    let experiment = Experiment::new();
    let (lanes, half) = ("train.lanes=6", "train.steps=6");
    run_ok(&mut experiment.launcher(3, "run", &[lanes, FAST, half]));
    // The same config, on as many ranks and on fewer.
    for (ranks, says) in [(3, None), (2, Some("steps from 7 on are those of 2 ranks, where the run had 3"))] {
        let run = format!("on-{ranks}");
        run_ok(std::process::Command::new("cp").arg("-r").args([experiment.path("run"), experiment.path(&run)]));
        let ran = experiment.train(ranks, &run, &[lanes, FAST]);
        assert_eq!(ran.text().contains("steps from"), says.is_some(), "{}", ran.text());
        assert!(says.is_none_or(|says| ran.text().contains(says)), "{}", ran.text());
        let newest = experiment.path(&run).join("checkpoints/step-000000010/manifest-0002.json");
        let manifest: Value = serde_json::from_slice(&fs::read(newest).unwrap()).unwrap();
        let mut expected = vec![json!({"from_step": 1, "world_size": 3})];
        if ranks != 3 {
            expected.push(json!({"from_step": 7, "world_size": ranks}));
        }
        assert_eq!(manifest["config"]["run"]["fast_world_sizes"], Value::from(expected));
    }
    for (ranks, overrides, refusal) in [
        (4, &[lanes, FAST][..], "allowed world sizes are 1, 2, 3, 6"),
        (2, &[lanes], "is not a power of two"),
        (2, &["reduction_dtype=bf16"], "would round at the borders of ranks"),
    ] {
        let ran = run(&mut experiment.launcher(ranks, "refused", overrides));
        assert_eq!(ran.code, Some(2), "{}", ran.text());
        assert!(ran.text().contains(refusal), "{}", ran.text());
    }
    let ran = run(&mut experiment.launcher(2, "on-2", &["train.lanes=8"]));
    assert!(ran.code != Some(0) && ran.text().contains("`reduction` was \"fast\""), "{}", ran.text());
}

/// Losses stay within a share of those of invariant sums, however gradients and weights are shared out, and each way gives the
/// same bits again.
#[test]
fn fast_sums_with_every_sharding_are_near_invariant_ones_and_the_same_again_on_the_same_ranks() {
    let experiment = Experiment::new();
    let lanes = ["train.lanes=8", "train.micro_batch=2", "log.tensorboard=false"];
    experiment.train(1, "invariant", &lanes);
    let expected = losses(&experiment, "invariant");
    let mut digests = Vec::new();
    for (number, (ranks, dtype, sharding, group)) in [
        (1, "fp32", 3, 0),
        (2, "fp32", 2, 0),
        (2, "bf16", 3, 0),
        (4, "fp32", 3, 0),
        (4, "bf16", 2, 0),
        (4, "bf16", 3, 2),
        (4, "fp32", 2, 2),
    ]
    .into_iter()
    .enumerate()
    {
        let mut overrides: Vec<String> = lanes.map(str::to_owned).to_vec();
        overrides.extend([FAST.to_owned(), format!("reduction_dtype={dtype}"), format!("train.sharding={sharding}")]);
        overrides.extend((group > 0).then(|| format!("train.sharding_ranks={group}")));
        let overrides: Vec<&str> = overrides.iter().map(String::as_str).collect();
        let of_turn = ["a", "b"].map(|turn| {
            let name = format!("fast-{number}-{turn}");
            experiment.train(ranks, &name, &overrides);
            (experiment.digest(&name), losses(&experiment, &name))
        });
        assert_eq!(of_turn[0], of_turn[1], "{overrides:?} on {ranks} ranks");
        let [(digest, found), _] = of_turn;
        // As for sharding 1, above.
        let tolerance = if dtype == "bf16" { 2e-2 } else { 1e-4 };
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= tolerance * expected, "{overrides:?}: {found}, invariant {expected}");
        }
        digests.push((dtype, ranks, digest[0].clone()));
    }
    // Rounding on the wire is not lost on the way.
    let rounded =
        |wanted: &str| digests.iter().filter(|(dtype, ..)| *dtype == wanted).map(|d| d.2.clone()).collect::<Vec<_>>();
    assert!(rounded("bf16").iter().all(|digest| !rounded("fp32").contains(digest)), "{digests:?}");
}

#[test]
fn a_checkpoint_of_fast_sums_moves_between_shardings_and_numbers_of_ranks() {
    let experiment = Experiment::new();
    let fast = [FAST, "reduction_dtype=bf16", "log.tensorboard=false"];
    let go_on = |run: &str, ranks: usize, steps: u64, sharding: u64| {
        let (steps, sharding) = (format!("train.steps={steps}"), format!("train.sharding={sharding}"));
        run_ok(&mut experiment.launcher(ranks, run, &[&fast[..], &[&steps, &sharding]].concat()));
    };
    let moves = [(4, 3, 3), (2, 6, 2), (1, 8, 1), (2, 10, 3)];
    for run in ["moved", "again"] {
        moves.into_iter().for_each(|(ranks, steps, sharding)| go_on(run, ranks, steps, sharding));
        assert_eq!(experiment.steps_of_last_attempt(run), [9, 10]);
    }
    assert_eq!(experiment.digest("moved"), experiment.digest("again"));
    go_on("alone", 1, 10, 1);
    for (found, expected) in losses(&experiment, "moved").iter().zip(losses(&experiment, "alone")) {
        assert!((found - expected).abs() <= 2e-2 * expected, "{found} {expected}");
    }
    // A start that makes no step leaves the values as they are, whoever reads them.
    let digest = experiment.digest("moved");
    for (ranks, sharding) in [(4, 2), (1, 3), (4, 0)] {
        go_on("moved", ranks, 10, sharding);
        assert_eq!(experiment.digest("moved"), digest);
    }
}
