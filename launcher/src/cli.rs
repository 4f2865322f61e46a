//! What was typed.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::plan::{Job, Request};

/// Train, sample, validate or evaluate on this machine or on a cluster: plan the ranks, start them, watch them.
///
/// Without a command it trains; running it again continues the run from its last committed checkpoint.
/// Exit codes: 0 the last step was reached, or all samples are written; 75 saved on request, run it again to continue;
/// 2 wrong usage or config; 1 anything else.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Cli {
    /// The run's TOML config.
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Machines to run on [default: cluster.nodes of the config, or as many as --hosts names].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub nodes: Option<u32>,
    /// Ranks per machine [default: its GPUs, or its cores over train.threads_per_rank, rounded down to fit the lanes].
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(u32).range(1..))]
    pub procs_per_node: Option<u32>,
    /// Host names, separated by commas.
    #[arg(long, value_name = "HOST,…", value_delimiter = ',')]
    pub hosts: Vec<String>,
    /// Engine that starts the ranks [default: local on one machine, else mpirun].
    #[arg(long, value_enum)]
    pub via: Option<Via>,
    /// Override a key of the config, e.g. --set train.steps=100. May be repeated.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print the plan and start nothing.
    #[arg(long)]
    pub dry_run: bool,
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

impl Cli {
    /// The part of the command line that the plan depends on.
    pub fn request(&self) -> Request {
        Request {
            nodes: self.nodes.map(|nodes| nodes as usize),
            procs_per_node: self.procs_per_node.map(|procs| procs as usize),
            hosts: self.hosts.clone(),
            via: self.via,
            job: match self.command {
                None => Job::Train,
                Some(Command::Sample { .. }) => Job::Sample,
                Some(Command::Validate { .. }) => Job::Validate,
                Some(Command::Evaluate { .. }) => Job::Evaluate,
            },
        }
    }
}
