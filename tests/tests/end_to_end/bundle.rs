//! The folder that `./dev bundle` makes, moved: nothing of the project, the wheel or the environment is there. `./dev test --bundle`.

use crate::experiment::{Experiment, run_ok};
use std::path::Path;
use std::process::Command;

/// A program of the bundle in a mount namespace where the project's folder, the caches and the home folder are empty.
fn hidden(experiment: &Experiment, bundle: &Path, program: &str) -> Command {
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let home = std::env::var("HOME").unwrap();
    let venv = project.join(".venv").canonicalize().unwrap();
    let hide: Vec<String> = [venv.as_path(), Path::new(&home), project]
        .iter()
        .map(|folder| format!("mount -t tmpfs none '{}'", folder.display()))
        .collect();
    // No temporary folder may lie in what is hidden.
    assert!(!experiment.path("").starts_with(project) && !experiment.path("").starts_with(&home));
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c"]).arg(format!(r#"{} && exec "$@""#, hide.join(" && "))).arg("sh");
    command.args(["env", "-i", "PATH=/usr/bin:/bin"]).arg(bundle.join("bin").join(program)).current_dir("/");
    command
}

#[test]
#[ignore = "needs root and a bundle: ./dev test --bundle"]
fn a_bundle_trains_wherever_it_is_put() {
    let experiment = Experiment::new();
    experiment.train(2, "reference", &[]);
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("target/bundle");
    let bundle = experiment.path("some where/else");
    std::fs::create_dir_all(&bundle).unwrap();
    run_ok(Command::new("cp").arg("-a").arg(made.join(".")).arg(&bundle));
    run_ok(Command::new("sha256sum").args(["--quiet", "-c", "SHA256SUMS"]).current_dir(&bundle));

    let url = format!("run.url={:?}", experiment.path("run").to_str().unwrap());
    let mut launcher = hidden(&experiment, &bundle, "launcher");
    launcher.arg("--config").arg(experiment.path("config.toml")).args(["--procs-per-node", "2", "--set", &url]);
    run_ok(&mut launcher);
    let digest = run_ok(hidden(&experiment, &bundle, "trainer").arg("digest").arg(experiment.path("run"))).stdout;
    assert_eq!(digest.lines().map(str::to_owned).collect::<Vec<_>>(), experiment.digest("reference"));
    let inspected = run_ok(hidden(&experiment, &bundle, "latents").arg("inspect").arg(experiment.path("data")));
    assert!(inspected.stdout.contains("100"), "{}", inspected.text());
}
