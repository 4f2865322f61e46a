//! Averages of other widths after the fact, from the checkpoints of a run.

use crate::experiment::{Experiment, Ran, binary, run, run_ok};
use safetensors::SafeTensors;
use std::process::Command;

const LONG: [&str; 4] = ["train.steps=60", "checkpoint.every_steps=6", "checkpoint.keep_last=99", "optimizer.lr=3e-3"];

fn ema(experiment: &Experiment, run_name: &str, arguments: &[&str], out: &str) -> Command {
    let mut command = Command::new(binary("trainer"));
    command.arg("ema").arg("--run").arg(experiment.path(run_name)).args(arguments);
    command.arg("--out").arg(experiment.path(out));
    command
}

/// All values of a file, in the order of names.
fn values(experiment: &Experiment, file: &str) -> (Vec<String>, Vec<f64>) {
    let bytes = std::fs::read(experiment.path(file)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut names: Vec<String> = tensors.names().into_iter().map(|name| name.to_string()).collect();
    names.sort();
    let of = |name: &String| tensors.tensor(name).unwrap().data().to_vec();
    let bytes: Vec<u8> = names.iter().flat_map(of).collect();
    let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f64::from(f32::from_le_bytes(*bytes)));
    (names.clone(), values.collect())
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn a_width_that_was_not_tracked_is_reconstructed_and_a_tracked_one_is_the_stored_one() {
    let experiment = Experiment::new();
    let with = |power: &'static str| LONG.into_iter().chain([power]).collect::<Vec<_>>();
    run_ok(&mut experiment.launcher(2, "two", &with("ema.power=[0.1, 0.2]")));
    run_ok(&mut experiment.launcher(1, "one", &with("ema.power=[0.15]")));
    assert_eq!(experiment.digest("two")[0], experiment.digest("one")[0], "averages do not change the weights");

    let told = run_ok(&mut ema(&experiment, "two", &["--sigma-rel", "0.15"], "found.safetensors"));
    assert!(told.stdout.contains("from 20 averages of steps 6, 12, 18"), "{}", told.text());
    run_ok(&mut ema(&experiment, "one", &["--sigma-rel", "0.15"], "tracked.safetensors"));
    run_ok(&mut ema(&experiment, "two", &["--sigma-rel", "0.2"], "wide.safetensors"));
    let [(names, found), (_, tracked), (_, wide)] =
        ["found", "tracked", "wide"].map(|name| values(&experiment, &format!("{name}.safetensors")));
    assert!(names.contains(&"pos_embed".to_owned()) && names.contains(&"blocks.1.attn.qkv.weight".to_owned()));
    let (off, apart) = (distance(&found, &tracked), distance(&wide, &tracked));
    assert!(off < 0.1 * apart, "{off} from the tracked one, which is {apart} from its neighbour");

    // A tracked width comes out as it was stored, at any step.
    run_ok(&mut ema(&experiment, "two", &["--sigma-rel", "0.1", "--step", "30"], "stored.safetensors"));
    let (_, stored) = values(&experiment, "stored.safetensors");
    let url = experiment.path("two/checkpoints/step-000000030");
    let digest = run_ok(Command::new(binary("trainer")).arg("digest").arg(&url).arg("--tensors"));
    let expected = digest.stdout.lines().find(|line| line.starts_with("ema_power_0.1 ")).unwrap();
    let sha256 = sha256_of(&stored);
    assert_eq!(expected, format!("ema_power_0.1 {sha256}"));
}

fn sha256_of(values: &[f64]) -> String {
    use sha2::{Digest, Sha256};
    let bytes: Vec<u8> = values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect();
    Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn what_cannot_be_reconstructed_is_refused_with_the_reason() {
    let experiment = Experiment::new();
    experiment.train(1, "run", &[]);
    let refused = |arguments: &[&str]| -> Ran {
        let ran = run(&mut ema(&experiment, "run", arguments, "out.safetensors"));
        assert_eq!(ran.code, Some(1), "{}", ran.text());
        assert!(!experiment.path("out.safetensors").exists());
        ran
    };
    assert!(refused(&["--sigma-rel", "0.1"]).stderr.contains("train with ema.power = [0.05, 0.1]"));
    assert!(refused(&["--sigma-rel", "0.4"]).stderr.contains("give a width above 0 and at most 0.28"));
    assert!(
        refused(&["--sigma-rel", "0.1", "--step", "5"])
            .stderr
            .contains("no committed checkpoint of step 5; there are steps")
    );
}
