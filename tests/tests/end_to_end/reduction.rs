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
