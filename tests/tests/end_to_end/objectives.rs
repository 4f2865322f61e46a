//! Every objective trains: the same bits on any number of ranks, a log that fits, draws that another program can use.

use crate::experiment::{Experiment, binary, run, run_ok};
use safetensors::SafeTensors;
use serde_json::Value;
use std::fs;
use std::process::Command;

/// Objective with its further keys, and whether the log has a variational bound.
const OBJECTIVES: [(&[&str], bool); 4] = [
    (&["diffusion.objective=\"x_start\"", "diffusion.schedule=\"squared-cosine\""], true),
    (&["diffusion.objective=\"v\"", "diffusion.schedule=\"scaled-linear\"", "diffusion.zero_terminal_snr=true"], true),
    (&["diffusion.objective=\"eps\"", "diffusion.min_snr_gamma=5", "model.learn_sigma=false"], false),
    (&["diffusion.objective=\"flow\"", "diffusion.timestep_sampling=\"logit-normal\""], false),
];

#[test]
fn every_objective_has_the_same_bits_on_one_rank_and_on_four() {
    let experiment = Experiment::new();
    let mut digests = Vec::new();
    for (number, (keys, has_bound)) in OBJECTIVES.iter().enumerate() {
        let (one, four) = (format!("{number}-one"), format!("{number}-four"));
        experiment.train(1, &one, keys);
        experiment.train(4, &four, keys);
        assert_eq!(experiment.digest(&one), experiment.digest(&four), "{keys:?}");
        digests.push(experiment.digest(&one)[0].clone());
        let log = experiment.log(&one);
        for event in log.iter().filter(|event| event["event"] == "step") {
            assert_eq!(event["vb"].is_number(), *has_bound, "{keys:?}: {event}");
            assert!(event["mse"].as_f64().unwrap() > 0.0, "{keys:?}: {event}");
        }
    }
    digests.dedup();
    assert_eq!(digests.len(), OBJECTIVES.len(), "every objective leads somewhere else");
}

#[test]
fn a_run_does_not_go_on_with_another_objective() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    for (key, shown) in [
        ("diffusion.objective=\"v\"", "`diffusion.objective` was \"eps\" and is now \"v\""),
        ("diffusion.min_snr_gamma=5", "`diffusion.min_snr_gamma` was null and is now 5"),
    ] {
        let ran = run(&mut experiment.launcher(1, "run", &[key, "train.steps=20"]));
        assert!(ran.code != Some(0) && ran.stderr.contains(shown), "{}", ran.text());
    }
}

/// Writes the draws of 5 steps in files of `steps_per_file`; gives the named tensor of all of them, end to end.
fn draws(experiment: &Experiment, steps_per_file: usize, keys: &[&str], tensor: &str) -> (Vec<Vec<usize>>, Vec<u8>) {
    let out = experiment.path("draws");
    let _ = fs::remove_dir_all(&out);
    let mut command = Command::new(binary("trainer"));
    command.arg("draws").arg("--config").arg(experiment.path("config.toml")).args(["--steps", "5"]);
    command.args(["--steps-per-file", &steps_per_file.to_string()]).arg("--out").arg(&out);
    for key in keys {
        command.args(["--set", key]);
    }
    run_ok(&mut command);
    let names = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> = names.filter(|path| path.to_string_lossy().contains("/draws-")).collect();
    files.sort();
    let (mut shapes, mut bytes) = (Vec::new(), Vec::new());
    for file in files {
        let file = fs::read(file).unwrap();
        let file = SafeTensors::deserialize(&file).unwrap();
        let view = file.tensor(tensor).unwrap();
        shapes.push(view.shape().to_vec());
        bytes.extend(view.data());
    }
    (shapes, bytes)
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    bytes.chunks(4).map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]))).collect()
}

#[test]
fn draws_are_those_of_the_run() {
    let experiment = Experiment::new();
    let (shapes, noise) = draws(&experiment, 2, &[], "noise");
    assert_eq!(shapes, [[2, 16, 4, 4, 4], [2, 16, 4, 4, 4], [1, 16, 4, 4, 4]].map(|shape| shape.to_vec()));
    assert_eq!(draws(&experiment, 100, &[], "noise").1, noise, "whatever the size of the files");
    let labels = draws(&experiment, 100, &[], "labels").1;
    let labels: Vec<u8> = labels.chunks(8).map(|label| label[0]).collect();
    assert!(labels.contains(&3) && labels.iter().all(|label| *label <= 3), "label 3 is the null label: {labels:?}");

    // A new model outputs 0, so that its first error is the mean square of what it should have predicted.
    let mean_square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>() / values.len() as f64;
    let first_error = |run: &str, keys: &[&str]| {
        experiment.train(1, run, keys);
        let log: Vec<Value> = experiment.log(run);
        log.iter().find(|event| event["event"] == "step").unwrap()["mse"].as_f64().unwrap()
    };
    let of_first_step = 16 * 64;
    let eps = mean_square(&floats(&noise)[..of_first_step]);
    let found = first_error("eps", &[]);
    assert!((found - eps).abs() < 1e-5, "{found} and {eps}");

    let flow = ["diffusion.objective=\"flow\""];
    let (noise, x_start) = (draws(&experiment, 9, &flow, "noise").1, draws(&experiment, 9, &flow, "x_start").1);
    let velocity: Vec<f64> = floats(&x_start).iter().zip(floats(&noise)).map(|(x, n)| x - n).collect();
    let velocity = mean_square(&velocity[..of_first_step]);
    let found = first_error("flow", &flow);
    assert!((found - velocity).abs() < 1e-5, "{found} and {velocity}");
    let times = floats(&draws(&experiment, 9, &flow, "t").1);
    assert!(times.len() == 80 && times.iter().all(|t| (0.0..1.0).contains(t)), "{times:?}");
}
