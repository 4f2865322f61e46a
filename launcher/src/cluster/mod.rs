//! Engines that start ranks. An engine turns a plan into one command, which the launcher starts and watches, or into something
//! that it hands over: a batch script, a manifest.

mod kubernetes;
mod mpirun;
mod slurm;
pub mod token;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use configs::events::{EVENTS_STDOUT, EVENTS_VARIABLE};
use configs::{RunConfig, location};

use crate::cli::{Cli, Command, Via};
use crate::plan::Plan;

/// An engine on which a plan can be started.
pub trait Cluster {
    /// What starts all ranks of the plan.
    ///
    /// # Errors
    /// What is missing for it, with the remedy.
    fn start(&self, plan: &Plan, trainer: &TrainerCall) -> Result<Start, ClusterError>;
}

/// How a plan is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Start {
    /// By a command of this machine that ends when the ranks have ended.
    Engine(EngineCommand),
    /// By somebody else, later.
    Handover(Handover),
}

/// Why an engine cannot start a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// Machines without names.
    #[error(
        "{nodes} nodes via mpirun need their names: give --hosts a,b,…, --hostfile FILE or cluster.hosts; inside a Slurm allocation \
         none are needed; from its login node use --via slurm"
    )]
    NoHosts {
        /// Nodes of the plan.
        nodes: usize,
    },
    /// Names that the engine has no use for.
    #[error(
        "--hosts and cluster.hosts are for mpirun; {via} chooses its own machines: leave them out or use --via mpirun"
    )]
    Hosts {
        /// The engine asked for.
        via: Via,
    },
    /// One machine is not enough.
    #[error("--via local is this machine alone; found {nodes} nodes: use --nodes 1, or --via mpirun with --hosts")]
    NotLocal {
        /// Nodes of the plan.
        nodes: usize,
    },
    /// A key that this engine cannot do without.
    #[error("`{key}` is missing, which --via {via} needs: {advice}")]
    Missing {
        /// The engine asked for.
        via: Via,
        /// The config's key.
        key: &'static str,
        /// What to give.
        advice: &'static str,
    },
    /// Only training is handed over to a scheduler.
    #[error("--via {via} hands training over to a scheduler; for another command start the launcher inside of a job")]
    NotTraining {
        /// The engine asked for.
        via: Via,
    },
    /// The config's text cannot be put into a manifest.
    #[error("{path}: {reason}; the manifest takes the config along, so it has to be readable")]
    Config {
        /// The config's file.
        path: String,
        /// As the system tells it.
        reason: String,
    },
    /// What is handed over is read by others.
    #[error(
        "`{key}` holds credentials, which would be written into a manifest; take them out of the URL and use {remedy}"
    )]
    Secret {
        /// The config's key.
        key: &'static str,
        /// Where they belong.
        remedy: &'static str,
    },
}

/// One process that runs the whole group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineCommand {
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// Variables on top of the inherited environment; ranks see them too. Credentials are inherited, never listed.
    pub env: Vec<(&'static str, String)>,
    /// How its output tells the ranks apart.
    pub output: Output,
    /// Whether ranks meet over TCP, for which they need a secret of this start in their environment.
    pub meets_over_tcp: bool,
}

/// Something for a scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handover {
    /// A batch script or a manifest.
    pub text: String,
    /// The program that takes the text on its standard input; none: the text is printed.
    pub submit: Vec<OsString>,
}

/// Whose lines an engine's output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// All of it is rank 0's.
    RankZero,
    /// Pieces are marked `[job,RANK]<stdout>:`; unmarked ones are mpirun's own.
    Tagged,
    /// Lines begin with `RANK: `; others are srun's own.
    Labelled,
}

fn shown(argv: &[OsString]) -> Vec<String> {
    argv.iter().map(|argument| location::redact(&argument.to_string_lossy())).collect()
}

impl Start {
    /// The arguments of what is started, for people to read: no credentials.
    pub fn shown(&self) -> Vec<String> {
        match self {
            Start::Engine(command) => shown(&command.argv),
            Start::Handover(handover) => shown(&handover.submit),
        }
    }

    /// Variables that are set for it.
    pub fn env(&self) -> &[(&'static str, String)] {
        match self {
            Start::Engine(command) => &command.env,
            Start::Handover(_) => &[],
        }
    }
}

/// How a rank's program is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainerCall {
    program: PathBuf,
    config: PathBuf,
    overrides: Vec<String>,
    command: &'static str,
    /// What follows config and overrides.
    options: Vec<OsString>,
}

impl TrainerCall {
    /// The trainer's command beside the launcher's own executable, with the config's absolute path.
    pub fn new(cli: &Cli) -> anyhow::Result<TrainerCall> {
        let this = std::env::current_exe().context("cannot find the launcher's own executable")?;
        let config = std::path::absolute(&cli.config)
            .with_context(|| format!("cannot make the path {} absolute", cli.config.display()))?;
        let (command, options) = match &cli.command {
            None => ("train", traced(cli)?),
            Some(_) if cli.trace.is_some() => bail!("--trace is for training; leave it out with a command"),
            Some(Command::Sample { options }) => ("sample", options.clone()),
            Some(Command::Validate { options }) => ("validate", options.clone()),
            Some(Command::Evaluate { options }) => ("evaluate", options.clone()),
            Some(Command::Doctor { options }) => ("doctor", options.clone()),
        };
        let program = this.with_file_name("trainer");
        Ok(TrainerCall { program, config, overrides: cli.set.clone(), command, options })
    }

    /// Refuses a trainer that is not there; better here than once per rank.
    pub fn check(&self) -> anyhow::Result<()> {
        if !self.program.is_file() {
            bail!("{}: no trainer beside the launcher; build it with ./dev build", self.program.display());
        }
        Ok(())
    }

    fn argv(&self) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec![self.program.clone().into(), self.command.into()];
        argv.extend(self.what_to_train(&self.config));
        argv.extend(self.options.iter().cloned());
        argv
    }

    /// The launcher that is to do later, elsewhere, what this one was asked to.
    fn launcher(&self, config: &Path) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec![self.program.with_file_name("launcher").into()];
        argv.extend(self.what_to_train(config));
        argv
    }

    fn what_to_train(&self, config: &Path) -> Vec<OsString> {
        let mut argv: Vec<OsString> = vec!["--config".into(), config.into()];
        for pair in &self.overrides {
            argv.extend(["--set".into(), pair.into()]);
        }
        argv
    }
}

/// The trainer's options for a trace.
fn traced(cli: &Cli) -> anyhow::Result<Vec<OsString>> {
    let Some(file) = &cli.trace else { return Ok(Vec::new()) };
    let file =
        std::path::absolute(file).with_context(|| format!("cannot make the path {} absolute", file.display()))?;
    let mut options: Vec<OsString> = vec!["--trace".into(), file.into()];
    if let Some(steps) = cli.trace_steps {
        options.extend(["--trace-steps".into(), steps.to_string().into()]);
    }
    Ok(options)
}

/// The engine that a plan is to be started with.
pub fn for_plan(plan: &Plan, config: &RunConfig) -> Box<dyn Cluster> {
    let cluster = config.cluster.clone();
    match plan.via {
        Via::Local | Via::Mpirun => Box::new(mpirun::Mpirun::of_this_user(cluster)),
        Via::Slurm => Box::new(slurm::Slurm { config: cluster }),
        Via::Kubernetes => Box::new(kubernetes::Kubernetes { config: config.clone() }),
    }
}

/// Over TCP, Open MPI would ask for a message's parts one by one, each request behind data on its way to the other rank, so that a
/// slow network would stand idle for a third of the time. With sends alone (1) it does not.
const TCP_VARIABLE: &str = "OMPI_MCA_btl_tcp_flags";
const TCP_SENDS_ONLY: &str = "1";

/// What ranks need in their environment.
fn environment(threads_per_rank: usize) -> Vec<(&'static str, String)> {
    let threads = threads_per_rank.to_string();
    let tcp = std::env::var(TCP_VARIABLE).unwrap_or_else(|_| TCP_SENDS_ONLY.to_owned());
    vec![
        (TCP_VARIABLE, tcp),
        (EVENTS_VARIABLE, EVENTS_STDOUT.to_owned()),
        // Threads are part of the experiment: set, and not changed at run time.
        ("OMP_NUM_THREADS", threads.clone()),
        ("MKL_NUM_THREADS", threads),
        ("OMP_DYNAMIC", "FALSE".to_owned()),
        ("MKL_DYNAMIC", "FALSE".to_owned()),
    ]
}

#[cfg(test)]
mod kubernetes_tests;
#[cfg(test)]
mod tests;
