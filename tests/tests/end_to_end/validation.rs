//! Held-out losses do not depend on ranks or interruptions, and the best checkpoint stays.

use crate::experiment::{Experiment, binary, finish, run, run_ok, start, wait_until, write_dataset};
use data_loader::{LatentRow, LatentWriter, WriterOptions};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

/// A tiny experiment with a held-out data set of other rows.
fn experiment() -> Experiment {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("held-out"), |row, mean| mean.iter_mut().for_each(|x| *x += (row % 7) as f32 * 0.1));
    let mut config = fs::read_to_string(experiment.path("config.toml")).unwrap();
    config += "validation = { url = \"held-out\", every_steps = 3, rows = 50, bins = 5, batch = 8, draws = 2 }\n";
    fs::write(experiment.path("config.toml"), config).unwrap();
    experiment
}

/// What was measured, by step and weights: loss, parts, bins. Measured twice, it must have been the same.
fn measured(experiment: &Experiment, run: &str) -> BTreeMap<(u64, String), Value> {
    let mut found = BTreeMap::new();
    for event in experiment.log(run).into_iter().filter(|event| event["event"] == "validation") {
        let key = (event["step"].as_u64().unwrap(), event["weights"].as_str().unwrap().to_owned());
        let value = serde_json::json!({"loss": event["loss"], "parts": event["parts"], "bins": event["bins"]});
        let earlier = found.insert(key.clone(), value.clone());
        assert!(earlier.is_none_or(|earlier| earlier == value), "{key:?} changed");
    }
    found
}

fn manifest(experiment: &Experiment, run: &str, step: u64) -> Value {
    let folder = experiment.path(run).join(format!("checkpoints/step-{step:09}"));
    let manifest = folder.read_dir().unwrap().map(|entry| entry.unwrap().path()).find(|path| path.is_file()).unwrap();
    serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap()
}

#[test]
fn losses_have_the_same_bits_on_any_ranks_in_manifests_and_by_command() {
    let experiment = experiment();
    let options = ["ema.further_decays=[0.5]", "validation.weights=[\"ema\", \"model\", \"ema_0.5\"]"];
    let mut seen = None;
    for ranks in [1, 2, 4] {
        let run = format!("run-{ranks}");
        experiment.train(ranks, &run, &options);
        let found = measured(&experiment, &run);
        let steps: Vec<u64> = found.keys().filter(|(_, weights)| weights == "model").map(|(step, _)| *step).collect();
        assert_eq!((steps, found.len()), (vec![3, 6, 9, 10], 12));
        assert_eq!(*seen.get_or_insert_with(|| found.clone()), found, "{ranks} ranks");
    }
    let found = seen.unwrap();
    let losses: Vec<f64> = found.values().map(|value| value["loss"].as_f64().unwrap()).collect();
    assert!(losses.iter().enumerate().all(|(i, loss)| loss.is_finite() && !losses[..i].contains(loss)), "{losses:?}");
    for value in found.values() {
        let bins: Vec<f64> = value["bins"].as_array().unwrap().iter().map(|bin| bin.as_f64().unwrap()).collect();
        assert_eq!(bins.len(), 5);
        let loss = value["loss"].as_f64().unwrap();
        assert!((loss - bins.iter().sum::<f64>() / 5.0).abs() < 1e-12);
        let parts = value["parts"].as_object().unwrap().values().map(|part| part.as_f64().unwrap()).sum::<f64>();
        assert!((loss - parts).abs() < 1e-5, "{value}");
    }
    for step in [6, 9, 10] {
        let metrics = manifest(&experiment, "run-2", step)["metrics"].clone();
        assert_eq!(metrics.as_object().unwrap().len(), 3);
        for weights in ["ema", "model", "ema_0.5"] {
            assert_eq!(metrics[format!("val_loss/{weights}")], found[&(step, weights.to_owned())]["loss"]);
        }
    }
    // The command's ranks share the rows as well.
    for ranks in [1, 2] {
        let mut command = experiment.launcher(ranks, "run-4", &options);
        let ran = run_ok(command.args(["validate", "--json"]));
        let said: String = ran.stdout.lines().filter_map(|line| line.strip_prefix("[rank 0] ")).collect();
        let said: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&said["step"], &said["rows"]), (&10.into(), &50.into()));
        for weights in ["ema", "model", "ema_0.5"] {
            assert_eq!(said["weights"][weights], found[&(10, weights.to_owned())], "{ranks} ranks, {weights}");
        }
    }
    // One process finds everything in the checkpoint. Another draw of everything is another estimate of the same loss.
    let mut command = Command::new(binary("trainer"));
    command.args(["validate", "--json", "--seed", "1", "--weights", "model", "--checkpoint"]);
    let said: Value = serde_json::from_str(&run_ok(command.arg(experiment.path("run-1"))).stdout).unwrap();
    let (other, first) = (&said["weights"]["model"]["loss"], &found[&(10, "model".to_owned())]["loss"]);
    let (other, first) = (other.as_f64().unwrap(), first.as_f64().unwrap());
    assert!(other != first && (other / first - 1.0).abs() < 0.5, "{other} {first}");
}

#[test]
fn validation_changes_nothing_else_and_an_interrupted_run_measures_the_same() {
    let experiment = experiment();
    // Whichever step it is that the stop comes after, its validation is due and has to wait.
    let long = ["train.steps=60", "checkpoint.every_steps=15", "log.every_steps=5", "validation.every_steps=1"];
    run_ok(&mut experiment.launcher(1, "reference", &long));
    run_ok(&mut experiment.launcher(1, "plain", &[&long[..], &["validation.every_steps=0"]].concat()));
    assert_eq!(experiment.digest("plain"), experiment.digest("reference"));
    assert!(measured(&experiment, "plain").is_empty());

    let child = start(&mut experiment.launcher(2, "stopped", &long));
    wait_until("a validation", || !measured(&experiment, "stopped").is_empty());
    Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert_eq!(finish(child).code, Some(75));
    run_ok(&mut experiment.launcher(4, "stopped", &long));
    let reference = measured(&experiment, "reference");
    assert_eq!(reference.len(), 2 * 60);
    assert_eq!(measured(&experiment, "stopped"), reference);
    assert_eq!(experiment.digest("stopped"), experiment.digest("reference"));
}

#[test]
fn the_best_checkpoint_survives_and_every_command_finds_it() {
    let experiment = experiment();
    let options = [
        // At which the loss soon grows by orders of magnitude.
        "optimizer.lr=0.1",
        "model.learn_sigma=false",
        "validation.every_steps=1",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=2",
        "checkpoint.keep_best=1",
        "checkpoint.best_metric=val_loss/model",
    ];
    experiment.train(2, "run", &options);
    let losses = measured(&experiment, "run");
    let of_model = losses.iter().filter(|((_, weights), _)| weights == "model");
    let by_loss = of_model.map(|((step, _), value)| (value["loss"].as_f64().unwrap(), *step));
    let best = by_loss.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap().1;
    assert!(best < 9, "the last steps are kept anyway");
    let kept = fs::read_dir(experiment.path("run/checkpoints")).unwrap();
    let mut kept: Vec<String> = kept.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    kept.sort();
    assert_eq!(kept, [best, 9, 10].map(|step| format!("step-{step:09}")));
    assert_eq!(experiment.digest("run/checkpoints/best")[3], format!("step {best}"));
    assert_eq!(experiment.digest("run/checkpoints/best/val_loss/model")[3], format!("step {best}"));
    let refused = run(Command::new(binary("trainer")).arg("digest").arg(experiment.path("run/checkpoints/best/fid")));
    assert!(refused.code != Some(0) && refused.stderr.contains("val_loss/ema, val_loss/model"), "{}", refused.text());
}

#[test]
fn held_out_data_that_cannot_be_used_are_refused_before_anything_is_made() {
    let experiment = experiment();
    let refuse = |overrides: &[&str], says: &[&str]| {
        let ran = run(&mut experiment.launcher(2, "run", overrides));
        assert!(!matches!(ran.code, Some(0 | 75)), "{}", ran.text());
        assert!(says.iter().all(|text| ran.stderr.contains(text)), "{says:?}: {}", ran.text());
        assert!(ran.text().matches("trainer: error").count() <= 1, "more than one rank reports: {}", ran.text());
        assert!(experiment.log("run").is_empty() && !experiment.path("run/attempts").join("0001.json").exists());
    };
    refuse(&["validation.url=/nonexistent/held-out"], &["validation.url", "/nonexistent/held-out"]);
    refuse(&["validation.bins=101"], &["validation.bins", "= 100"]);
    refuse(&["validation.rows=1000", "validation.bins=201"], &["validation.url", "200 draws", "201 bins"]);
    refuse(&["checkpoint.best_metric=val_loss/emma"], &["checkpoint.best_metric", "val_loss/ema"]);
    let other = experiment.path("other.parquet");
    let mut writer = LatentWriter::create(&other, WriterOptions::new(vec![4, 8, 8])).unwrap();
    writer.push(LatentRow { mean: &[0.0; 256], logvar: &[0.0; 256], flipped: None, label: 0, id: "a" }).unwrap();
    writer.finish().unwrap();
    refuse(&[&format!("validation.url={:?}", other.to_str().unwrap())], &["[4, 8, 8]", "[4, 4, 4]"]);
}
