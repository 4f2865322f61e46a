//! Scores of samples, as a command and during training. The Inception weights are made up.

use crate::experiment::{Experiment, binary, run, run_ok};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use tch::{Device, Kind, Tensor};
use trainer::images::{ImageBatch, NpzWriter};
use trainer::interop::{NamedWeights, safetensors::write_weights};
use trainer::metrics::{Inception, MetricsError};

/// A weight file with the names and shapes that the network asks for.
fn made_up_inception(path: &Path) {
    tch::manual_seed(1);
    let Err(MetricsError::Weights { problems, .. }) = Inception::from_weights(BTreeMap::new(), Device::Cpu) else {
        panic!("an empty file must be refused")
    };
    let tensor = |problem: &String| {
        let (name, shape) = problem.split_once(": missing, expected shape ").unwrap();
        let shape: Vec<i64> = serde_json::from_str(shape).unwrap();
        let options = (Kind::Float, Device::Cpu);
        let tensor = match name.rsplit_once('.').unwrap().1 {
            "running_var" => Tensor::ones(&shape, options),
            "weight" if shape.len() == 1 => Tensor::ones(&shape, options),
            "weight" => Tensor::randn(&shape, options) * (2.0 / shape[1..].iter().product::<i64>() as f64).sqrt(),
            _ => Tensor::zeros(&shape, options),
        };
        (name.to_owned(), tensor)
    };
    let weights = NamedWeights { tensors: problems.iter().map(tensor).collect(), model: None };
    write_weights(path, &weights, safetensors::Dtype::F32).unwrap();
}

/// RGB pictures of 16 × 16.
fn pixels(count: usize, shift: usize) -> Vec<u8> {
    let value = |at: usize| ((at / 768 + shift + 2) * (at % 768) * (at % 768 / 16 + 3) % 251) as u8;
    (0..count * 768).map(value).collect()
}

fn write_npz(path: &Path, count: usize, shift: usize) {
    let mut npz = NpzWriter::create(path, count, 16, 16).unwrap();
    npz.push(&ImageBatch::new([count, 3, 16, 16], pixels(count, shift)).unwrap()).unwrap();
    npz.finish(None).unwrap();
}

fn json(text: &str) -> Value {
    serde_json::from_str(text.lines().find(|line| line.starts_with('{')).expect(text)).unwrap()
}

#[test]
fn scores_are_the_same_on_any_number_of_ranks_and_from_kept_statistics() {
    let experiment = Experiment::new();
    let inception = experiment.path("inception.safetensors");
    made_up_inception(&inception);
    write_npz(&experiment.path("samples.npz"), 9, 0);
    write_npz(&experiment.path("reference.npz"), 11, 30);
    let files = |reference: &str, more: &[&str]| -> Vec<PathBuf> {
        let path = |name: &str| experiment.path(name);
        let mut options: Vec<PathBuf> = vec!["--samples".into(), path("samples.npz")];
        options.extend(["--reference".into(), path(reference), "--inception".into(), inception.clone()]);
        options.extend(["--json".into(), "--batch".into(), "2".into(), "--device".into(), "cpu".into()]);
        options.extend(more.iter().map(PathBuf::from));
        options
    };
    let trainer = |options: Vec<PathBuf>| {
        json(&run_ok(Command::new(binary("trainer")).arg("evaluate").args(["--threads", "1"]).args(options)).stdout)
    };
    let stats = experiment.path("stats.npz");
    let alone = trainer(files("reference.npz", &["--save-stats", stats.to_str().unwrap()]));
    assert!(alone["fid"].as_f64().unwrap() > 0.0 && alone["sfid"].as_f64().unwrap() > 0.0, "{alone}");
    assert!(alone["inception_score"].as_f64().unwrap() >= 1.0 && alone["samples"] == 9, "{alone}");
    let kept = trainer(files("stats.npz", &[]));
    for (name, score) in alone.as_object().unwrap().iter().filter_map(|(name, score)| Some((name, score.as_f64()?))) {
        let again = kept[name].as_f64().unwrap();
        assert!((score - again).abs() <= 1e-6 * score, "{name}: {score}, from kept statistics {again}");
    }
    for ranks in [2, 3] {
        let mut launcher = experiment.launcher(ranks, "run", &[]);
        let out = experiment.path("scores.json");
        let options = files("reference.npz", &["--out", out.to_str().unwrap()]);
        let ran = run_ok(launcher.arg("evaluate").args(options));
        assert_eq!(json(&fs::read_to_string(&out).unwrap()), alone, "{ranks} ranks");
        assert!(ran.stderr.contains("evaluated"), "{}", ran.text());
    }

    let refuse = |options: &[&str], says: &[&str]| {
        let mut launcher = experiment.launcher(2, "run", &[]);
        let ran = run(launcher.arg("evaluate").args(options));
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        for text in says {
            assert!(ran.stderr.contains(text), "`{text}` is not said: {}", ran.text());
        }
        assert!(ran.text().matches("trainer: error").count() <= 1, "more than one rank reports: {}", ran.text());
    };
    let vae =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4/diffusion_pytorch_model.safetensors");
    let samples = experiment.path("samples.npz");
    let [samples, vae, inception] = [&samples, &vae, &inception].map(|path| path.to_str().unwrap());
    refuse(&["--samples", samples, "--inception", inception], &["--reference is missing"]);
    refuse(
        &["--samples", samples, "--reference", samples, "--inception", vae],
        &["tensors are not those of the Inception-v3 of 2015-12-05", "fc.weight: missing, expected shape [1008, 2048]"],
    );
    fs::write(experiment.path("cut.npz"), &fs::read(samples).unwrap()[..4000]).unwrap();
    let cut = experiment.path("cut.npz");
    refuse(
        &["--samples", cut.to_str().unwrap(), "--reference", samples, "--inception", inception],
        &["cut.npz: not a readable .npz file"],
    );
}

#[test]
fn fid_while_training_depends_on_the_weights_only_and_chooses_the_best_checkpoint() {
    let experiment = Experiment::new();
    made_up_inception(&experiment.path("inception.safetensors"));
    write_npz(&experiment.path("reference.npz"), 6, 0);
    let vae = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4");
    let vae = format!("sample.vae={:?}", vae.to_str().unwrap());
    let fid = [
        "fid.reference=reference.npz",
        "fid.inception=inception.safetensors",
        "fid.every_steps=3",
        "fid.num=5",
        "fid.weights=[\"ema\", \"model\"]",
        "checkpoint.keep_best=1",
        "checkpoint.best_metric=fid/model",
        "checkpoint.keep_last=2",
        "optimizer.lr=0.02",
        "sample.batch=2",
        "sample.steps=2",
        &vae,
    ];
    experiment.train(1, "plain", &["optimizer.lr=0.02"]);
    let mut measured = Vec::new();
    for ranks in [1, 2] {
        let name = format!("run-{ranks}");
        experiment.train(ranks, &name, &fid);
        assert_eq!(experiment.digest(&name), experiment.digest("plain"), "measuring changes the run");
        let scores = experiment.log(&name).into_iter().filter(|event| event["event"] == "scores");
        let of_run: Vec<Value> =
            scores.map(|event| serde_json::json!([event["step"], event["weights"], event["scores"]])).collect();
        measured.push(of_run);
    }
    assert_eq!(measured[0], measured[1]);
    let steps: Vec<u64> = measured[0].iter().map(|scores| scores[0].as_u64().unwrap()).collect();
    assert_eq!(steps, [3, 3, 6, 6, 9, 9, 10, 10]);
    let fid_of = |scores: &Value| scores[2]["fid"].as_f64().unwrap();
    assert!(measured[0].iter().all(|scores| fid_of(scores) > 0.0));
    assert!(measured[0].windows(2).all(|pair| fid_of(&pair[0]) != fid_of(&pair[1])), "{measured:?}");
    let of_model = measured[0].iter().filter(|scores| scores[1] == "model");
    let best = of_model.min_by(|a, b| fid_of(a).total_cmp(&fid_of(b))).unwrap()[0].as_u64().unwrap();
    let kept: Vec<String> = fs::read_dir(experiment.path("run-1/checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(kept.contains(&format!("step-{best:09}")), "best {best}: {kept:?}");
}
