//! Samples from a checkpoint.

use crate::experiment::{Experiment, Ran, binary, finish, run, run_ok, start, wait_until, write_dataset};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

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
    for other in [
        ["--seed", "1"],
        ["--labels", "2"],
        ["--label-draw", "uniform"],
        ["--cfg-scale", "3"],
        ["--cfg-interval", "0.2,0.6"],
        ["--sampler", "ddim"],
        ["--sampler", "dpm-solver++"],
        ["--weights", "model"],
    ] {
        assert_ne!(first, sample(&experiment, "c.npz", &[&["--num", "6"], &other[..]].concat()), "{other:?}");
    }
    let six = |options: &[&str]| sample(&experiment, "c.npz", &[&["--num", "6"], options].concat());
    assert_eq!(first, six(&["--cfg-interval", "0,1"]));
    assert_eq!(six(&["--cfg-interval", "0.5,0.5"]), six(&["--cfg-scale", "1"]));
    let grid = image_size(&fs::read(experiment.path("a.png")).unwrap());
    assert_eq!(grid, (2 + 3 * 18, 2 + 2 * 18), "3 classes wide, 2 rows of 16×16 images with a gap of 2");
    let array = npz_array(&first, "arr_0.npy");
    assert!(array.contains("(6, 16, 16, 3") && array.contains("|u1"), "{array}");
}

#[test]
fn a_data_set_is_previewed_decoded() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |_, _| {});
    let preview = |options: &[&str]| {
        let mut command = Command::new(binary("trainer"));
        command.arg("preview").arg(experiment.path("data")).args(["--vae", &vae(), "--out"]);
        run(command.arg(experiment.path("p.png")).args(options))
    };
    let done = preview(&["--num", "6"]);
    assert_eq!(done.code, Some(0), "{}", done.text());
    let plain = fs::read(experiment.path("p.png")).unwrap();
    assert_eq!(image_size(&plain), (2 + 3 * 18, 2 + 2 * 18), "3 wide, 2 rows of 16×16 images with a gap of 2");
    assert_eq!(preview(&["--num", "6", "--stored-scale", "3"]).code, Some(0));
    assert_ne!(plain, fs::read(experiment.path("p.png")).unwrap());
    let refused = preview(&["--stored-scale", "0"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("--stored-scale 0"), "{}", refused.text());
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

/// `launcher … sample` on so many ranks.
fn launcher_sample(experiment: &Experiment, ranks: usize, out: &str, options: &[&str]) -> Command {
    let mut command = experiment.launcher(ranks, "run", &[]);
    command.args(["sample", "--steps", "5", "--vae", &vae(), "--out"]).arg(experiment.path(out)).args(options);
    command
}

/// What is in the experiment's folder of the file `out` that is still being written.
fn unfinished(experiment: &Experiment, out: &str) -> Vec<String> {
    let names = fs::read_dir(experiment.folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    names.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with(&format!(".{out}.tmp"))).collect()
}

#[test]
fn one_file_comes_from_any_number_of_ranks() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |_, _| {});
    experiment.train(1, "run", &["optimizer.lr=0.02"]);
    let options = ["--num", "11", "--batch", "2", "--label-draw", "uniform"];
    let alone = sample(&experiment, "alone.npz", &[&options[..], &["--threads", "1"]].concat());
    for ranks in [1, 2, 3, 4] {
        let out = format!("{ranks}.npz");
        let ran = run_ok(&mut launcher_sample(&experiment, ranks, &out, &options));
        assert!(ran.stderr.contains("all samples are written"), "{}", ran.text());
        assert!(ran.text().contains("sampling: 11/11 images"), "{}", ran.text());
        assert!(fs::read(experiment.path(&out)).unwrap() == alone, "{ranks} ranks write other bytes");
        assert!(unfinished(&experiment, &out).is_empty());
    }
    assert!(npz_array(&alone, "arr_0.npy").contains("(11, 16, 16, 3"));
    assert!(npz_array(&alone, "arr_1.npy").contains("(11,"));
}

#[test]
fn a_flow_is_trained_drawn_and_sampled_with_the_samplers_of_a_flow() {
    let experiment = Experiment::new();
    write_dataset(&experiment.path("data"), |_, _| {});
    let vae_key = format!("sample.vae={:?}", vae());
    let flow = ["diffusion.objective=flow", "optimizer.lr=0.02", "sample.every_steps=5", &vae_key, "sample.steps=3"];
    experiment.train(2, "run", &flow);
    assert!(experiment.path("run/samples/step-000000010.png").exists());
    let default = sample(&experiment, "default.npz", &["--num", "3"]);
    assert_eq!(default, sample(&experiment, "heun.npz", &["--num", "3", "--sampler", "heun2"]));
    let sampled = |options: &[&str]| {
        let mut command = Command::new(binary("trainer"));
        command.args(["sample", "--num", "3", "--vae", &vae(), "--checkpoint"]).arg(experiment.path("run"));
        run_ok(command.arg("--out").arg(experiment.path("x.npz")).args(options));
        fs::read(experiment.path("x.npz")).unwrap()
    };
    // Methods of a high order come to the same 8-bit pixels.
    for accurate in
        [&["--sampler", "heun3", "--steps", "5"][..], &["--sampler", "rk4", "--steps", "5"], &["--sampler", "dopri5"]]
    {
        sampled(accurate);
    }
    let mut seen = vec![default];
    for options in [
        &["--sampler", "euler", "--steps", "5"][..],
        &["--sampler", "midpoint", "--steps", "2"],
        &["--sampler", "euler-maruyama", "--steps", "5"],
        &["--sampler", "euler-maruyama", "--steps", "5", "--sde-diffusion", "constant"],
        &["--sampler", "stochastic-heun", "--steps", "5", "--sde-last-step", "tweedie"],
    ] {
        let found = sampled(options);
        assert!(!seen.contains(&found), "{options:?}");
        seen.push(found);
    }
    let refused = run(&mut launcher_sample(&experiment, 2, "y.npz", &["--sampler", "ddim"]));
    assert_refused(&refused, &["ddim does not reverse a flow", "dopri5, euler-maruyama"]);
}

fn assert_refused(ran: &Ran, says: &[&str]) {
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    for text in says {
        assert!(ran.stderr.contains(text), "`{text}` is not said: {}", ran.text());
    }
    let errors = ran.text().matches("trainer: error").count();
    assert!(errors <= 1, "more than one rank reports: {}", ran.text());
}

/// Enough to be interrupted.
const MANY: [&str; 4] = ["--num", "100000", "--batch", "4"];

#[test]
fn a_rank_that_dies_ends_the_sampling_by_name_and_leaves_no_file() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    let child = start(&mut launcher_sample(&experiment, 2, "x.npz", &MANY));
    wait_until("samples", || !unfinished(&experiment, "x.npz").is_empty());
    let pattern = format!("trainer sample .*{}", experiment.path("x.npz").display());
    let found = Command::new("pgrep").args(["-f", &format!("^[^ ]*{pattern}")]).output().unwrap();
    let found = String::from_utf8_lossy(&found.stdout).into_owned();
    let rank = found.lines().next_back().expect("no rank found");
    Command::new("kill").args(["-KILL", rank]).stderr(Stdio::null()).status().unwrap();
    let ran = finish(child);
    assert_eq!(ran.code, Some(1), "{}", ran.text());
    assert!(ran.stderr.contains("rank 0 failed") || ran.stderr.contains("rank 1 failed"), "{}", ran.text());
    assert!(ran.stderr.contains("no samples were written") && !experiment.path("x.npz").exists(), "{}", ran.text());
}

#[test]
fn sampling_that_is_asked_to_stop_stops_and_leaves_nothing() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    for ranks in [1, 2] {
        let child = start(&mut launcher_sample(&experiment, ranks, "x.npz", &MANY));
        wait_until("samples", || !unfinished(&experiment, "x.npz").is_empty());
        Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
        let ran = finish(child);
        assert_refused(&ran, &["stopped on request; no samples were written"]);
        assert!(!experiment.path("x.npz").exists() && unfinished(&experiment, "x.npz").is_empty(), "{}", ran.text());
    }
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
    refuse(
        &["--checkpoint", run, "--sampler", "euler"],
        "a Gaussian diffusion, which the model was trained on; use ddpm",
    );
    refuse(&["--checkpoint", run, "--sampler", "plms"], "dpm-solver++");
    refuse(&["--checkpoint", run, "--eta", "0.5"], "--eta means nothing to the sampler ddpm");
    refuse(&["--checkpoint", run, "--cfg-interval", "0.6,0.4"], "--cfg-interval");
    refuse(&["--checkpoint", run, "--weights", "ema2"], "it has ema, model");
    refuse(&[], "--checkpoint");
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
