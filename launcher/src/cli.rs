//! What was typed.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::plan::{Job, Request};

/// Train, sample, validate or evaluate on this machine or on a cluster: plan the ranks, start them, watch them.
///
/// Without a command it trains; running it again continues the run from its last committed checkpoint.
/// `launcher status URL [--json]`, without a config, says what a run has come to, from its folder alone.
/// Exit codes: 0 the last step was reached, or all samples are written; 75 saved on request, run it again to continue;
/// 2 wrong usage or config; 1 anything else.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// The run's TOML config.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Machines to run on, such as 4; or 2..4: as many of --hosts as answer, at least two of them [default: cluster.nodes of the
    /// config, or as many as there are].
    #[arg(long, value_name = "N|A..B")]
    pub nodes: Option<Nodes>,
    /// Ranks per machine [default: its GPUs, or its cores over train.threads_per_rank, rounded down to fit the lanes].
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u32).range(1..))]
    pub procs_per_node: Option<u32>,
    /// Host names, separated by commas [default: cluster.hosts of the config].
    #[arg(long, value_name = "HOST,…", value_delimiter = ',', value_parser = host)]
    pub hosts: Vec<String>,
    /// A file of host names, one a line; what follows a name (slots=8) and comments (#) are passed over.
    #[arg(long, value_name = "FILE", conflicts_with = "hosts")]
    pub hostfile: Option<PathBuf>,
    /// Engine that starts the ranks [default: slurm inside a Slurm allocation, local on one machine, else mpirun]. Outside of an
    /// allocation slurm submits a batch script; kubernetes prints a manifest.
    #[arg(long, value_enum)]
    pub via: Option<Via>,
    /// How often a group that failed is started again, on the machines that answer [default: cluster.restarts of the config, or
    /// 10 with --nodes A..B, else 0].
    #[arg(long, value_name = "N")]
    pub restarts: Option<u32>,
    /// Override a key of the config, e.g. --set train.steps=100. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write what all ranks did, and when, in the first steps into this file, for Perfetto (ui.perfetto.dev) or chrome://tracing.
    #[arg(long, value_name = "FILE")]
    pub trace: Option<PathBuf>,
    /// Steps to trace [default: 20].
    #[arg(long, value_name = "N", requires = "trace", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub trace_steps: Option<u64>,
    /// Append to this file, every second or less often with many ranks, where every rank is and how the run goes: a JSON object a line.
    #[arg(long, value_name = "FILE")]
    pub status_file: Option<PathBuf>,
    /// Serve the same over HTTP while the launcher runs: a page at /, /metrics for Prometheus, /status.json. 127.0.0.1:PORT is for programs
    /// of this machine; another address needs a token in DITHAROS_STATUS_TOKEN, or in the file of DITHAROS_STATUS_TOKEN_FILE.
    #[arg(long, value_name = "ADDR:PORT")]
    pub status_addr: Option<SocketAddr>,
    /// Print the plan and start nothing: who computes what, whether it fits, how long it will take. `launcher plan …` is the same.
    #[arg(long)]
    pub dry_run: bool,
    /// Plan for machines with so many GPUs each, whatever is here.
    #[arg(long, value_name = "G", requires = "dry_run", value_parser = clap::value_parser!(u32).range(1..))]
    pub gpus: Option<u32>,
    /// Predict times and fit for a100, h100, cpu or a file with the keys of estimate/src/hardware.toml [default: what is here; a100
    /// for a GPU of another name].
    #[arg(long, value_name = "NAME|FILE", requires = "dry_run")]
    pub hardware: Option<String>,
    /// Time the training step on this machine for the prediction; takes seconds to a minute.
    #[arg(long, requires = "dry_run", conflicts_with = "gpus")]
    pub measure: bool,
    /// Print the plan as JSON.
    #[arg(long, requires = "dry_run")]
    pub json: bool,
    /// What to do; training when not given.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// What the ranks can be started for besides training.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Draw images from the run's newest checkpoint on all ranks into one file, whose content does not depend on their
    /// number. All options are those of `trainer sample`.
    #[command(disable_help_flag = true)]
    Sample {
        /// Options of `trainer sample`, such as --num 50000 --out samples.npz; see `trainer sample --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// The held-out loss of the run's newest checkpoint, computed by all ranks; the same bits from any number of them. All
    /// options are those of `trainer validate`; `[validation]` of the config gives data and draws.
    #[command(disable_help_flag = true)]
    Validate {
        /// Options of `trainer validate`, such as --json; see `trainer validate --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// What would keep this run from running well, looked for by the very ranks that would train: libraries, GPUs, memory, data, the
    /// store's promises, clocks, the speed of the network. Exit 0: nothing was found.
    #[command(disable_help_flag = true)]
    Doctor {
        /// Options of `trainer doctor`, such as --json.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
    /// FID, sFID, Inception Score, precision and recall of samples, computed by all ranks; the same scores from any number of
    /// them. All options are those of `trainer evaluate`; `[fid]` of the config gives reference and Inception weights.
    #[command(disable_help_flag = true)]
    Evaluate {
        /// Options of `trainer evaluate`, such as --samples samples.npz; see `trainer evaluate --help`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTIONS")]
        options: Vec<OsString>,
    },
}

/// What starts the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// This machine: one process directly, several through mpirun.
    Local,
    /// mpirun over several hosts.
    Mpirun,
    /// srun or sbatch.
    Slurm,
    /// An MPIJob.
    Kubernetes,
}

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Via::Local => "local",
            Via::Mpirun => "mpirun",
            Via::Slurm => "slurm",
            Via::Kubernetes => "kubernetes",
        })
    }
}

/// How many machines: `N`, or `A..B` for what there is between the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Nodes {
    /// Fewer are not enough; at least 1.
    pub least: usize,
    /// More are not used.
    pub most: usize,
}

impl Nodes {
    /// As many, no fewer.
    pub fn exactly(nodes: usize) -> Nodes {
        Nodes { least: nodes, most: nodes }
    }
}

impl FromStr for Nodes {
    type Err = String;

    fn from_str(text: &str) -> Result<Nodes, String> {
        let (least, most) = text.split_once("..").unwrap_or((text, text));
        match (least.parse(), most.parse()) {
            (Ok(least), Ok(most)) if 1 <= least && least <= most => Ok(Nodes { least, most }),
            _ => Err("expected a number of at least 1, or two of them as in 2..4".to_owned()),
        }
    }
}

/// A name that no program takes for an option.
fn host(text: &str) -> Result<String, String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    match !text.is_empty() && !text.starts_with('-') && text.chars().all(is_name) {
        true => Ok(text.to_owned()),
        false => Err(format!("{text:?} is no host name or IPv4 address")),
    }
}

/// `launcher plan …` spelled out: `launcher --dry-run …`.
pub fn spelled_out(arguments: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = arguments.into_iter().collect();
    if let Some(first) = arguments.get_mut(1).filter(|first| *first == "plan") {
        *first = "--dry-run".into();
    }
    arguments
}

impl Cli {
    /// What `--set` and `--gpus` change in the config.
    pub fn overrides(&self) -> Vec<String> {
        let gpus =
            self.gpus.iter().flat_map(|gpus| [format!("cluster.gpus_per_node={gpus}"), "train.device=cuda".to_owned()]);
        self.set.iter().cloned().chain(gpus).collect()
    }

    /// The part of the command line that the plan depends on.
    ///
    /// # Errors
    /// A host file that cannot be read or names no host.
    pub fn request(&self) -> anyhow::Result<Request> {
        let hosts = match &self.hostfile {
            None => self.hosts.clone(),
            Some(file) => read_hosts(file).with_context(|| format!("--hostfile {}", file.display()))?,
        };
        Ok(Request {
            nodes: self.nodes,
            procs_per_node: self.procs_per_node.map(|procs| procs as usize),
            hosts,
            via: self.via,
            allocation: allocated_nodes(|name| std::env::var(name).ok()),
            job: match self.command {
                None => Job::Train,
                Some(Command::Sample { .. }) => Job::Sample,
                Some(Command::Validate { .. }) => Job::Validate,
                Some(Command::Evaluate { .. }) => Job::Evaluate,
                Some(Command::Doctor { .. }) => Job::Doctor,
            },
        })
    }
}

fn read_hosts(file: &Path) -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(file)?;
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    let names = lines.filter_map(|line| line.split_whitespace().next());
    let hosts = names.map(|name| host(name).map_err(anyhow::Error::msg)).collect::<anyhow::Result<Vec<String>>>()?;
    anyhow::ensure!(!hosts.is_empty(), "names no host; expected one a line");
    Ok(hosts)
}

/// Nodes of the Slurm allocation that this process is in, if it is in one and no rank itself.
fn allocated_nodes(variable: impl Fn(&str) -> Option<String>) -> Option<usize> {
    variable("SLURM_JOB_ID")?;
    variable("SLURM_JOB_NUM_NODES")?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_host_file_of_mpirun_or_of_kubernetes_gives_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hostfile");
        std::fs::write(&file, "# nodes\nada slots=8\n\nbob.lan:4\n").unwrap();
        assert!(read_hosts(&file).unwrap_err().to_string().contains("bob.lan:4"));
        std::fs::write(&file, "# nodes\nada slots=8\n\n  10.0.0.2 # spare\n").unwrap();
        assert_eq!(read_hosts(&file).unwrap(), ["ada", "10.0.0.2"]);
        std::fs::write(&file, "# nobody\n").unwrap();
        assert!(read_hosts(&file).unwrap_err().to_string().contains("names no host"));
        assert!(host("--mca").is_err() && host("a b").is_err() && host("").is_err());
    }

    #[test]
    fn plan_is_a_dry_run_and_gpus_are_those_of_the_machines_to_plan_for() {
        let cli = |words: &str| Cli::try_parse_from(spelled_out(words.split(' ').map(OsString::from)));
        let plan = cli("launcher plan --config c --nodes 4 --gpus 8 --set train.steps=9 --json").unwrap();
        assert!(plan.dry_run && plan.json && plan.command.is_none());
        assert_eq!(plan.overrides(), ["train.steps=9", "cluster.gpus_per_node=8", "train.device=cuda"]);
        assert!(!cli("launcher --config plan").unwrap().dry_run, "a file of that name");
        assert!(cli("launcher --config c --gpus 8").unwrap_err().to_string().contains("--dry-run"));
    }

    #[test]
    fn an_allocation_is_known_by_its_job() {
        let of = |pairs: &'static [(&str, &str)]| {
            allocated_nodes(|name| pairs.iter().find(|pair| pair.0 == name).map(|pair| pair.1.to_owned()))
        };
        assert_eq!(of(&[("SLURM_JOB_ID", "7"), ("SLURM_JOB_NUM_NODES", "4")]), Some(4));
        assert_eq!(of(&[("SLURM_JOB_NUM_NODES", "4")]), None);
    }
}
