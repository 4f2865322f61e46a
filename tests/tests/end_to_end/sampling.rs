//! Samples from a checkpoint.

use crate::experiment::{Experiment, binary, run, run_ok, write_dataset};
use std::fs;
use std::path::Path;
use std::process::Command;

fn vae() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/vae/fashion-kl-f4").to_str().unwrap().to_owned()
}

fn sample(experiment: &Experiment, out: &str, options: &[&str]) -> Vec<u8> {
    let mut command = Command::new(binary("trainer"));
    command.args(["sample", "--steps", "5", "--vae", &vae(), "--checkpoint"]).arg(experiment.path("run"));
    run_ok(command.arg("--out").arg(experiment.path(out)).args(options));
    fs::read(experiment.path(out)).unwrap()
}

#[test]
fn samples_depend_on_seed_labels_and_guidance_and_on_nothing_else() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |_, _| {});
    experiment.train(1, "run", &["optimizer.lr=0.02"]);
    let first = sample(&experiment, "a.npz", &["--num", "6", "--grid", experiment.path("a.png").to_str().unwrap()]);
    assert_eq!(first, sample(&experiment, "b.npz", &["--num", "6"]));
    for other in
        [["--seed", "1"], ["--labels", "2"], ["--cfg-scale", "3"], ["--sampler", "ddim"], ["--weights", "model"]]
    {
        assert_ne!(first, sample(&experiment, "c.npz", &[&["--num", "6"], &other[..]].concat()), "{other:?}");
    }
    let grid = image_size(&fs::read(experiment.path("a.png")).unwrap());
    assert_eq!(grid, (2 + 3 * 18, 2 + 2 * 18), "3 classes wide, 2 rows of 16×16 images with a gap of 2");
    let array = npz_array(&first, "arr_0.npy");
    assert!(array.contains("(6, 16, 16, 3") && array.contains("|u1"), "{array}");
}

#[test]
fn grids_are_drawn_while_training_and_do_not_depend_on_the_ranks_or_change_the_run() {
    let experiment = Experiment::new();
    let vae = format!("sample.vae={:?}", vae());
    let grids = ["sample.every_steps=5", &vae, "sample.num=7", "sample.batch=2", "sample.steps=3"];
    experiment.train(1, "plain", &[]);
    for ranks in [1, 2, 4] {
        experiment.train(ranks, &format!("run-{ranks}"), &grids);
    }
    for run in ["run-1", "run-2", "run-4"] {
        assert_eq!(experiment.digest(run), experiment.digest("plain"));
        for step in [5, 10] {
            let name = format!("samples/step-{step:09}.png");
            let image = fs::read(experiment.path(run).join(&name)).unwrap();
            assert_eq!(image, fs::read(experiment.path("run-1").join(&name)).unwrap(), "{run} {name}");
        }
    }
    let steps = experiment.log("run-2").into_iter().filter(|event| event["event"] == "sample");
    assert_eq!(steps.map(|event| event["step"].as_u64().unwrap()).collect::<Vec<_>>(), [5, 10]);
}

#[test]
fn a_wrong_request_is_refused_by_name() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    let refuse = |options: &[&str], says: &str| {
        let mut command = Command::new(binary("trainer"));
        command.args(["sample", "--vae", &vae(), "--out"]).arg(experiment.path("x.npz"));
        let ran = run(command.args(options));
        assert!(ran.code != Some(0) && ran.stderr.contains(says), "{says}: {}", ran.text());
        assert!(!experiment.path("x.npz").exists());
    };
    let run = experiment.path("run");
    let run = run.to_str().unwrap();
    refuse(&["--checkpoint", run, "--labels", "3"], "3 is no class");
    refuse(&["--checkpoint", run, "--steps", "2000"], "2000");
    refuse(&["--checkpoint", "/nonexistent/run"], "/nonexistent/run");
    refuse(&["--checkpoint", &format!("{run}/checkpoints/step-000000777")], "no committed checkpoint of step 777");
}

fn image_size(png: &[u8]) -> (u32, u32) {
    let number = |at: usize| u32::from_be_bytes(png[at..at + 4].try_into().unwrap());
    assert_eq!(&png[12..16], b"IHDR");
    (number(16), number(20))
}

/// The header of an array in an uncompressed npz file.
fn npz_array(npz: &[u8], name: &str) -> String {
    let at = npz.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    String::from_utf8_lossy(&npz[at..at + 200]).into_owned()
}
