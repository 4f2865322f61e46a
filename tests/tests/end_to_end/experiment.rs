//! A tiny experiment in a folder of its own, and the programs that run it.

use data_loader::draws::{Key, Purpose, fill_normal};
use data_loader::{Columns, Dtype, LatentDataset, LatentRow, LatentWriter, WriterOptions};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// No command of a test takes longer; one that does is killed and the test fails.
pub const DEADLINE: Duration = Duration::from_secs(120);
/// Rows of the data set: 6 steps of 4 lanes × 4 rows, so that a run of 10 steps crosses an epoch.
const ROWS: usize = 100;
/// Steps of a run.
pub const STEPS: u64 = 10;

/// A folder with a data set and a config, removed with the value.
pub struct Experiment {
    pub folder: tempfile::TempDir,
}

/// What a program did.
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Everything it said.
    pub fn text(&self) -> String {
        format!("exit {:?}\n{}\n{}", self.code, self.stdout, self.stderr)
    }
}

pub fn binary(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_BIN_EXE_verify-bundle")).parent().unwrap();
    let path = folder.join(name);
    assert!(path.is_file(), "{} is not built: run ./dev build first (./dev test does)", path.display());
    path
}

/// Runs a command to its end, or kills it at the deadline.
pub fn finish(mut child: Child) -> Ran {
    let ended_by = Instant::now() + DEADLINE;
    let pipes = [child.stdout.take().map(read_all), child.stderr.take().map(read_all_err)];
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > ended_by {
            let _ = child.kill();
            panic!("still running after {DEADLINE:?}");
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let [stdout, stderr] = pipes.map(|pipe| pipe.map(|thread| thread.join().unwrap()).unwrap_or_default());
    Ran { code: status.code(), stdout, stderr }
}

fn read_all(mut pipe: std::process::ChildStdout) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || std::io::read_to_string(&mut pipe).unwrap_or_default())
}

fn read_all_err(mut pipe: std::process::ChildStderr) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || std::io::read_to_string(&mut pipe).unwrap_or_default())
}

pub fn run(command: &mut Command) -> Ran {
    finish(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
}

/// Writes a data set of posterior moments; `spoil` may change a row's mean.
pub fn write_dataset(folder: &Path, spoil: impl Fn(usize, &mut [f32])) {
    write_latents(folder, 3, 4, spoil);
}

/// As [`write_dataset`], of `classes` classes and latents with sides of `side`.
pub fn write_latents(folder: &Path, classes: usize, side: usize, spoil: impl Fn(usize, &mut [f32])) {
    fs::create_dir_all(folder).unwrap();
    let options = WriterOptions {
        scaling_factor: Some(0.5),
        num_classes: Some(classes),
        row_group_rows: 16,
        dtype: Dtype::F32,
        ..WriterOptions::new(vec![4, side, side])
    };
    let mut writer = LatentWriter::create(&folder.join("part-00000-of-00001.parquet"), options).unwrap();
    for row in 0..ROWS {
        let mut mean = vec![0f32; 4 * side * side];
        fill_normal(Key::new(5, Purpose::Noise, row as u64), &mut mean);
        spoil(row, &mut mean);
        let id = format!("row-{row}");
        let (label, logvar) = ((row % classes) as i64, vec![-2.0; mean.len()]);
        writer.push(LatentRow { mean: &mean, logvar: &logvar, flipped: None, label, id: &id }).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(LatentDataset::open(folder.to_str().unwrap(), &Columns::default()).unwrap().meta().rows, ROWS as u64);
}

impl Experiment {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        write_dataset(&folder.path().join("data"), |_, _| {});
        let config = format!(
            r#"
seed = 3
run.url = "run"
data = {{ url = "data", range_rows = 8, shuffle_window_rows = 20 }}
model = {{ hidden_size = 32, depth = 2, num_heads = 2, patch_size = 2, class_dropout_prob = 0.2 }}
optimizer = {{ lr = 1e-3, weight_decay = 0.01 }}
ema.decay = 0.9
train = {{ steps = {STEPS}, lanes = 4, micro_batch = 4 }}
checkpoint.every_steps = 3
log.every_steps = 1
collective.timeout_s = 60
"#
        );
        fs::write(folder.path().join("config.toml"), config).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The launcher's command for `ranks` ranks and the run folder `run`.
    pub fn launcher(&self, ranks: usize, run: &str, overrides: &[&str]) -> Command {
        let mut command = Command::new(binary("launcher"));
        command.arg("--config").arg(self.path("config.toml"));
        command.args(["--procs-per-node", &ranks.to_string()]);
        command.arg("--set").arg(format!("run.url={:?}", self.path(run).to_str().unwrap()));
        for value in overrides {
            command.args(["--set", value]);
        }
        // From another folder, without anything that the project's build sets.
        command.current_dir("/").env_remove("LIBTORCH").env_remove("LD_LIBRARY_PATH");
        command
    }

    /// Trains to the end and fails the test if that does not work.
    pub fn train(&self, ranks: usize, run: &str, overrides: &[&str]) -> Ran {
        let ran = run_ok(&mut self.launcher(ranks, run, overrides));
        assert_eq!(self.digest(run)[3], format!("step {STEPS}"), "{}", ran.text());
        ran
    }

    /// The lines of `trainer digest`: four, and one for every further average.
    pub fn digest(&self, run: &str) -> Vec<String> {
        let ran = run_ok(Command::new(binary("trainer")).arg("digest").arg(self.path(run)));
        let lines: Vec<String> = ran.stdout.lines().map(str::to_owned).collect();
        let starts = ["model ", "ema ", "adamw ", "step "];
        assert!(lines.len() >= 4 && lines.iter().zip(starts).all(|(l, s)| l.starts_with(s)), "{}", ran.text());
        lines
    }

    /// The events of `log.jsonl`.
    pub fn log(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(run).join("log.jsonl")).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Steps of the log from the last start on.
    pub fn steps_of_last_attempt(&self, run: &str) -> Vec<u64> {
        let log = self.log(run);
        let last_start = log.iter().rposition(|event| event["event"] == "start").unwrap_or(0);
        log[last_start..].iter().filter(|e| e["event"] == "step").map(|e| e["step"].as_u64().unwrap()).collect()
    }

    /// The newest manifest of a step.
    pub fn manifest(&self, run: &str, step: u64) -> Value {
        let folder = format!("{run}/checkpoints/step-{step:09}");
        let is_manifest = |path: &Path| path.extension().is_some_and(|extension| extension == "json");
        let of_step = |path: &Path| path.to_str().unwrap().contains(&folder) && is_manifest(path);
        let newest = self.committed(run).into_iter().rfind(|(path, _)| of_step(path));
        serde_json::from_slice(&newest.unwrap().1).unwrap()
    }

    /// Every committed checkpoint's files with their bytes.
    pub fn committed(&self, run: &str) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        collect(&self.path(run).join("checkpoints"), &mut files);
        files.sort();
        files
    }
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            collect(&entry.path(), files);
        } else {
            files.push((entry.path(), fs::read(entry.path()).unwrap()));
        }
    }
}

pub fn run_ok(command: &mut Command) -> Ran {
    let ran = run(command);
    assert_eq!(ran.code, Some(0), "{command:?}\n{}", ran.text());
    ran
}

/// Waits until `condition` holds, or fails the test.
pub fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let ended_by = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < ended_by, "{what} did not happen within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a piped child to a point and gives it.
pub fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}
