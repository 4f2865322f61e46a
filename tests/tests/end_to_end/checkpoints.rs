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

#[test]
fn a_damaged_checkpoint_is_named_passed_over_and_made_again_with_the_same_bits() {
    let experiment = Experiment::new();
    experiment.train(2, "whole", &[]);
    let newest: Vec<_> = experiment
        .committed("whole")
        .into_iter()
        .filter(|(path, _)| path.to_str().unwrap().contains("step-000000010"))
        .map(|(path, bytes)| (path.strip_prefix(experiment.path("whole")).unwrap().to_owned(), bytes))
        .collect();
    let [first_shard, second_shard, manifest] = &newest[..] else { panic!("{newest:?}") };
    let flip = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        let at = bytes.len() * 2 / 3;
        bytes[at] ^= 8;
        Some(bytes)
    };
    let cases = [
        (1, first_shard, flip(&first_shard.1)),
        (2, second_shard, Some(second_shard.1[..second_shard.1.len() - 1].to_vec())),
        (2, first_shard, None),
        (1, manifest, flip(&manifest.1)),
    ];
    for (number, (ranks, (object, _), damaged)) in cases.into_iter().enumerate() {
        let run_name = format!("damaged-{number}");
        run_ok(Command::new("cp").arg("-r").arg(experiment.path("whole")).arg(experiment.path(&run_name)));
        let path = experiment.path(&run_name).join(object);
        match damaged {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let key = object.to_str().unwrap();
        if number == 0 {
            let strict = run(&mut experiment.launcher(2, &run_name, &["checkpoint.on_damaged=fail"]));
            assert!(strict.code == Some(1) && strict.text().contains(key), "{}", strict.text());
            assert_eq!(strict.text().matches("trainer: error").count(), 1, "{}", strict.text());
        }
        let ran = run_ok(&mut experiment.launcher(ranks, &run_name, &[]));
        let warnings: Vec<&str> = ran.stderr.lines().filter(|line| line.contains("passed over")).collect();
        assert!(warnings.len() == 1 && warnings[0].contains("step 10") && warnings[0].contains(key), "{}", ran.text());
        assert_eq!(
            experiment.log(&run_name).iter().rfind(|event| event["event"] == "start").unwrap()["resumed_from"],
            9
        );
        assert_eq!(experiment.digest(&run_name), experiment.digest("whole"), "{key}");
    }
}
