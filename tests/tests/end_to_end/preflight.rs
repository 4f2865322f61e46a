//! What has to be the same on all ranks: one message tells who differs in what, and nothing was made.

use crate::experiment::{Experiment, Ran, binary, run};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Trains on two ranks of which the second is started as `second` says.
fn train_with(experiment: &Experiment, overrides: &[&str], second: &[&str]) -> Ran {
    train_in(experiment, Path::new("/"), overrides, second)
}

fn train_in(experiment: &Experiment, folder: &Path, overrides: &[&str], second: &[&str]) -> Ran {
    let trainer = binary("trainer");
    let run_url = format!("run.url={:?}", experiment.path("run").to_str().unwrap());
    let config = experiment.path("config.toml");
    let common = |config: &str| -> Vec<String> {
        let pairs = overrides.iter().copied().chain([run_url.as_str()]).flat_map(|pair| ["--set", pair]);
        ["train", "--config", config].into_iter().chain(pairs).map(str::to_owned).collect()
    };
    let mut command = Command::new("mpirun");
    command.args(["--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"]);
    command.args(["--mca", "oob_tcp_if_include", "lo", "--mca", "btl_tcp_if_include", "lo"]);
    command.args(["-n", "1"]).arg(trainer).args(common(config.to_str().unwrap()));
    let (config, program) = second.split_last().unwrap();
    command.args([":", "-n", "1"]).args(program).args(common(config));
    run(command.current_dir(folder))
}

fn assert_refused(experiment: &Experiment, ran: &Ran, says: &[&str]) {
    assert!(ran.code != Some(0), "{}", ran.text());
    let host = host_name();
    let unlike = format!("rank 1: on {host} it is unlike rank 0 on {host}: ");
    for text in says.iter().copied().chain([unlike.as_str()]) {
        assert!(ran.stderr.contains(text), "`{text}` is not said: {}", ran.text());
    }
    assert_eq!(ran.stderr.matches("trainer: error").count(), 1, "{}", ran.text());
    assert!(!experiment.path("run/checkpoints").exists() && !experiment.path("run/log.jsonl").exists());
}

fn host_name() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap().trim().to_owned()
}

/// A trainer of another build: a copy whose build id is another, with the libtorch of the first.
fn other_build(experiment: &Experiment) -> PathBuf {
    let trainer = binary("trainer");
    let mut bytes = fs::read(&trainer).unwrap();
    let note = [4u32, 20, 3].map(u32::to_ne_bytes).concat().into_iter().chain(*b"GNU\0").collect::<Vec<u8>>();
    let at = bytes.windows(note.len()).position(|window| window == note).expect("a build id") + note.len();
    bytes[at] ^= 0xff;
    let folder = experiment.path("target/release");
    fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::symlink(trainer.with_file_name("../../.venv"), experiment.path(".venv")).unwrap();
    let copy = folder.join("trainer");
    fs::copy(&trainer, &copy).unwrap();
    fs::write(&copy, bytes).unwrap();
    copy
}

#[test]
fn a_rank_of_another_build_is_named() {
    let experiment = Experiment::new();
    let (copy, config) = (other_build(&experiment), experiment.path("config.toml"));
    let ran = train_with(&experiment, &[], &[copy.to_str().unwrap(), config.to_str().unwrap()]);
    assert_refused(&experiment, &ran, &["the trainer: found build ", ", expected build ", "give every node the same"]);
    assert!(!ran.stderr.contains("libtorch: found"), "{}", ran.text());
}

#[test]
fn a_rank_with_another_config_is_named_with_the_keys() {
    let experiment = Experiment::new();
    let other = experiment.path("other.toml");
    let text = fs::read_to_string(experiment.path("config.toml")).unwrap();
    fs::write(&other, text.replace("ema.decay = 0.9\n", "ema.decay = 0.8\n")).unwrap();
    let trainer = binary("trainer");
    let ran = train_with(&experiment, &[], &[trainer.to_str().unwrap(), other.to_str().unwrap()]);
    assert_refused(&experiment, &ran, &["`ema.decay`: found 0.8, expected 0.9; give every node"]);
}

#[test]
fn a_rank_that_sees_another_data_set_is_named() {
    let experiment = Experiment::new();
    let data = experiment.path("elsewhere/data");
    crate::experiment::write_dataset(&data, |_, _| {});
    fs::rename(data.join("part-00000-of-00001.parquet"), data.join("renamed.parquet")).unwrap();
    // The same path that is another folder to the other rank, as a local disk is on another node.
    let [here, there] = [experiment.path(""), experiment.path("elsewhere")];
    let (trainer, config) = (binary("trainer"), experiment.path("config.toml"));
    let second = ["env", "-C", there.to_str().unwrap(), trainer.to_str().unwrap(), config.to_str().unwrap()];
    let ran = train_in(&experiment, &here, &["data.url=\"/proc/self/cwd/data\""], &second);
    assert_refused(&experiment, &ran, &["`dataset.layout_sha256`: found ", "every node has to see the same files"]);
}

#[test]
fn other_vector_instructions_end_an_invariant_run_and_are_a_warning_in_a_fast_one() {
    let experiment = Experiment::new();
    let (trainer, config) = (binary("trainer"), experiment.path("config.toml"));
    let second = ["env", "ATEN_CPU_CAPABILITY=default", trainer.to_str().unwrap(), config.to_str().unwrap()];
    let ran = train_with(&experiment, &[], &second);
    let said = ["the CPU capability that libtorch uses: found ", "use nodes with one kind of processor"];
    assert_refused(&experiment, &ran, &said);
    let ran = train_with(&experiment, &["reduction=fast"], &second);
    assert_eq!(ran.code, Some(0), "{}", ran.text());
    assert!(ran.stderr.contains(&format!("trainer: warning: rank 1: on {}", host_name())), "{}", ran.text());
    assert!(said.iter().all(|text| ran.stderr.contains(text)), "{}", ran.text());
}
