//! What people see: the plan, the log, TensorBoard files read by TensorBoard itself.

use crate::experiment::{Experiment, run_ok};
use std::path::Path;
use std::process::Command;

#[test]
fn a_dry_run_prints_the_plan_and_touches_nothing() {
    let experiment = Experiment::new();
    let ran = run_ok(experiment.launcher(2, "run", &[]).args(["--dry-run", "--json"]));
    let plan: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(plan["world_size"], 2);
    assert!(!experiment.path("run").exists());
}

#[test]
fn tensorboard_reads_every_step() {
    let experiment = Experiment::new();
    let vae = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4");
    let vae = format!("sample.vae={:?}", vae.to_str().unwrap());
    let validation = format!("validation.url={:?}", experiment.path("data").to_str().unwrap());
    let validation = [&validation, "validation.every_steps=5", "validation.bins=3"];
    let samples = ["sample.every_steps=10", "sample.num=2", "sample.steps=2", &vae];
    experiment.train(2, "run", &[&samples[..], &validation].concat());
    let script = r#"
import sys, json
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
tags = events.Tags()
image = events.Images("samples/ema")[0]
print(json.dumps({"scalars": {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]},
                  "image": [image.step, image.width, image.height]}))
"#;
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.venv/bin/python");
    let ran = run_ok(Command::new(python).args(["-c", script]).arg(experiment.path("run/tensorboard")));
    let seen: serde_json::Value = serde_json::from_str(ran.stdout.lines().last().unwrap()).unwrap();
    let log: Vec<_> = experiment.log("run").into_iter().filter(|event| event["event"] == "step").collect();
    assert_eq!(log.len(), 10);
    let pairs = [
        ("loss/total", "loss"),
        ("loss/mse", "mse"),
        ("loss/vb", "vb"),
        ("optimizer/lr", "lr"),
        ("optimizer/grad_norm", "grad_norm"),
        ("throughput/images_per_s", "images_per_s"),
        ("throughput/mfu", "mfu"),
    ];
    for (tag, key) in pairs {
        let points = seen["scalars"][tag].as_array().unwrap_or_else(|| panic!("no {tag} in {seen}"));
        assert_eq!(points.len(), log.len(), "{tag}");
        for (point, event) in points.iter().zip(&log) {
            assert_eq!(point[0], event["step"]);
            let (found, expected) = (point[1].as_f64().unwrap(), event[key].as_f64().unwrap());
            assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{tag} at {}: {found} {expected}", point[0]);
        }
    }
    let log = experiment.log("run");
    let validations = log.iter().filter(|event| event["event"] == "validation" && event["weights"] == "ema");
    for (index, event) in validations.enumerate() {
        let numbers = [("val_loss/ema", &event["loss"]), ("val_loss_by_time/ema/02", &event["bins"][2])];
        for (tag, expected) in numbers.into_iter().chain([("val_mse/ema", &event["parts"]["mse"])]) {
            let (point, expected) = (&seen["scalars"][tag][index], expected.as_f64().unwrap());
            assert_eq!(point[0], event["step"], "{tag}");
            assert!((point[1].as_f64().unwrap() - expected).abs() <= 1e-6 * expected.abs(), "{tag}: {point}");
        }
    }
    assert_eq!(seen["scalars"]["val_loss/model"].as_array().unwrap().len(), 2);
    assert_eq!(seen["image"][0], 10);
    assert_eq!(seen["image"][1], 2 + 2 * 18);
}
