//! `trainer checkpoints` on a run that was made by training.

use crate::experiment::{Experiment, Ran, binary, run, run_ok};
use std::fs;
use std::process::Command;

fn checkpoints(experiment: &Experiment, action: &[&str]) -> Ran {
    run(Command::new(binary("trainer")).arg("checkpoints").arg(experiment.path("run")).args(action))
}

#[test]
fn they_are_listed_verified_and_removed() {
    let experiment = Experiment::new();
    experiment.train(2, "run", &[]);
    let listed = checkpoints(&experiment, &["list", "--json"]);
    let steps: Vec<u64> = listed
        .stdout
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, [10, 9, 6], "{}", listed.text());
    assert_eq!(checkpoints(&experiment, &["verify"]).code, Some(0));

    let shard = experiment.committed("run").into_iter().find(|(path, _)| {
        let path = path.to_str().unwrap();
        path.contains("step-000000009") && path.ends_with("shard-00001-of-00002.safetensors")
    });
    let (path, mut bytes) = shard.unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let verified = checkpoints(&experiment, &["verify"]);
    assert_eq!(verified.code, Some(1));
    assert!(verified.stdout.contains("step 9") && verified.stdout.contains("shard-00001"), "{}", verified.text());
    assert_eq!(checkpoints(&experiment, &["verify", "10", "6"]).code, Some(0));

    assert_eq!(checkpoints(&experiment, &["rm", "9"]).code, Some(0));
    assert_eq!(checkpoints(&experiment, &["verify"]).code, Some(0));
    let refused = checkpoints(&experiment, &["rm", "10", "6"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("--force"), "{}", refused.text());
    let unknown = checkpoints(&experiment, &["rm", "7"]);
    assert!(unknown.code == Some(1) && unknown.stderr.contains("there are steps 10, 6"), "{}", unknown.text());
    assert_eq!(checkpoints(&experiment, &["rm", "10"]).code, Some(0));
    // The run goes on from what is left.
    run_ok(&mut experiment.launcher(1, "run", &[]));
    assert_eq!(experiment.digest("run")[3], "step 10");
}
