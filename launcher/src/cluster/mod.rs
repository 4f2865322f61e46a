//! Engines that start ranks. An engine turns a plan into one command; the launcher starts and watches that command.

mod local;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Context, bail};
use configs::location;

use crate::cli::{Cli, Command, Via};
use crate::plan::Plan;

/// An engine on which a plan can be started.
pub trait Cluster {
    /// The command that starts all ranks of the plan and ends when they have ended.
    ///
    /// # Errors
    /// This engine cannot run this plan yet.
    fn command(&self, plan: &Plan, trainer: &TrainerCall) -> Result<EngineCommand, NotBuilt>;
}

/// An engine that has no code yet.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "running on {nodes} node(s) via {via} is not built yet; use --nodes 1 --via local without --hosts, or --dry-run to see the plan"
)]
pub struct NotBuilt {
    /// The engine asked for.
    pub via: Via,
    /// Nodes of the plan.
    pub nodes: usize,
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
}

/// Whose lines an engine's output holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// All of it is rank 0's.
    RankZero,
    /// Pieces are marked `[job,RANK]<stdout>:`; unmarked ones are mpirun's own.
    Tagged,
}

impl EngineCommand {
    /// The arguments for people to read: no credentials.
    pub fn shown(&self) -> Vec<String> {
        self.argv.iter().map(|argument| location::redact(&argument.to_string_lossy())).collect()
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
            None => ("train", Vec::new()),
            Some(Command::Sample { options }) => ("sample", options.clone()),
            Some(Command::Validate { options }) => ("validate", options.clone()),
            Some(Command::Evaluate { options }) => ("evaluate", options.clone()),
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
        let mut argv: Vec<OsString> =
            vec![self.program.clone().into(), self.command.into(), "--config".into(), self.config.clone().into()];
        for pair in &self.overrides {
            argv.extend(["--set".into(), pair.into()]);
        }
        argv.extend(self.options.iter().cloned());
        argv
    }
}

/// The engine that a plan is to be started with.
pub fn for_plan(plan: &Plan) -> Box<dyn Cluster> {
    match plan.via {
        Via::Local => Box::new(local::Local::this_user()),
        Via::Mpirun | Via::Slurm | Via::Kubernetes => Box::new(Unbuilt),
    }
}

/// Stands for the engines that are still to come: plans can be seen, not run.
struct Unbuilt;

impl Cluster for Unbuilt {
    fn command(&self, plan: &Plan, _: &TrainerCall) -> Result<EngineCommand, NotBuilt> {
        Err(NotBuilt { via: plan.via, nodes: plan.nodes })
    }
}
