//! Bad input: one clear error that names file or key, a non-zero exit, nothing committed is touched.

use crate::experiment::{Experiment, Ran, binary, finish, run, start, wait_until, write_dataset};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

fn assert_refused(ran: &Ran, says: &[&str]) {
    assert!(!matches!(ran.code, Some(0) | Some(75)), "{}", ran.text());
    for text in says {
        assert!(ran.stderr.contains(text) || ran.stdout.contains(text), "`{text}` is not said: {}", ran.text());
    }
    let errors = ran.text().matches("trainer: error").count();
    assert!(errors <= 1, "more than one rank reports: {}", ran.text());
    assert!(!ran.text().contains("panicked"), "{}", ran.text());
}

#[test]
fn all_config_mistakes_are_reported_at_once() {
    let experiment = Experiment::new();
    let mistakes = ["train.lanes=6", "optimizer.lr=\"fast\"", "model.hiden_size=32"];
    let ran = run(&mut experiment.launcher(1, "run", &mistakes));
    assert_refused(&ran, &["train.lanes", "optimizer.lr", "model.hiden_size", "hidden_size"]);
    assert!(!experiment.path("run").exists(), "nothing may be made for a config that cannot be used");
}

#[test]
fn a_parquet_file_cut_in_half_is_named() {
    let experiment = Experiment::new();
    let file = experiment.path("data/part-00000-of-00001.parquet");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    assert_refused(&run(&mut experiment.launcher(2, "run", &[])), &["part-00000-of-00001.parquet"]);
}

#[test]
fn a_data_set_that_contradicts_the_config_is_refused() {
    let experiment = Experiment::new();
    let ran = run(&mut experiment.launcher(1, "run", &["model.num_classes=7", "model.input_size=8"]));
    assert_refused(&ran, &["model.num_classes", "7", "model.input_size"]);
}

#[test]
fn a_missing_vae_is_named() {
    let experiment = Experiment::new();
    let vae = "sample.vae=\"/nonexistent/vae\"";
    let ran = run(&mut experiment.launcher(1, "run", &["sample.every_steps=5", vae]));
    assert_refused(&ran, &["/nonexistent/vae"]);
    let mut encode = Command::new(binary("trainer"));
    encode.args(["encode", "--source", "folder:/nonexistent/images", "--vae", "/nonexistent/vae", "--out"]);
    assert_refused(&run(encode.arg(experiment.path("out"))), &["/nonexistent/"]);
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_before_anything_is_updated() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |row, mean| {
        if row == 60 {
            mean[7] = 1e30;
        }
    });
    let ran = run(&mut experiment.launcher(2, "run", &["checkpoint.every_steps=1"]));
    assert_refused(&ran, &["not finite", "lane"]);
    for (path, bytes) in experiment.committed("run").iter().filter(|(path, _)| path.ends_with("safetensors")) {
        let tensors = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let finite = |data: &[u8]| data.as_chunks::<4>().0.iter().all(|v| f32::from_le_bytes(*v).is_finite());
        assert!(tensors.iter().all(|(_, tensor)| finite(tensor.data())), "{}", path.display());
    }
}

/// The objects of the newest committed step, shards first.
fn newest_objects(experiment: &Experiment) -> Vec<PathBuf> {
    let objects = experiment.committed("run").into_iter().map(|(path, _)| path);
    let mut newest: Vec<_> = objects.filter(|path| path.to_str().unwrap().contains("step-000000010")).collect();
    newest.sort_by_key(|path| path.extension() != Some("safetensors".as_ref()));
    newest
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_the_one_before_it_is_used() {
    let experiment = Experiment::new();
    experiment.train(2, "run", &[]);
    let reference = experiment.digest("run");
    let shard = newest_objects(&experiment).remove(0);
    let mut bytes = fs::read(&shard).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&shard, bytes).unwrap();

    let refused = run(&mut experiment.launcher(1, "run", &["checkpoint.on_damaged=fail"]));
    assert_refused(&refused, &["step 10", "shard-0000"]);
    let digest = run(Command::new(binary("trainer")).arg("digest").arg(experiment.path("run")));
    assert!(digest.stdout.ends_with("step 9\n") && digest.stderr.contains("shard-0000"), "{}", digest.text());

    let ran = run(&mut experiment.launcher(2, "run", &[]));
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    assert!(ran.text().contains("shard-0000"), "the damaged object is not named: {}", ran.text());
    assert_eq!(experiment.steps_of_last_attempt("run"), [10]);
    assert_eq!(experiment.digest("run"), reference);
}

#[test]
fn another_experiment_is_not_continued() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    let before = experiment.committed("run");
    let ran = run(&mut experiment.launcher(1, "run", &["optimizer.lr=5e-4", "train.steps=20"]));
    assert_refused(&ran, &["optimizer.lr", "0.0005"]);
    assert_eq!(experiment.committed("run"), before);
}

#[test]
fn a_store_that_cannot_be_written_is_refused_within_seconds() {
    let experiment = Experiment::new();
    fs::write(experiment.path("file"), "not a folder").unwrap();
    assert_refused(&run(&mut experiment.launcher(2, "file/run", &[])), &["file/run"]);
}

#[test]
fn a_store_that_fails_while_the_run_goes_on_ends_it_with_one_error() {
    let experiment = Experiment::new();
    let long = ["train.steps=100000", "checkpoint.every_steps=20", "log.every_steps=20"];
    let child = start(&mut experiment.launcher(2, "run", &long));
    wait_until("a checkpoint", || experiment.log("run").iter().any(|event| event["event"] == "checkpoint"));
    let checkpoints = experiment.path("run/checkpoints");
    fs::rename(&checkpoints, experiment.path("moved")).unwrap();
    fs::write(&checkpoints, "no folder any more").unwrap();
    assert_refused(&finish(child), &["phase checkpoint", "shard-0000"]);
}
