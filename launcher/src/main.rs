//! `launcher`: plans a run, starts its ranks on an engine, watches them until they end.
//!
//! Reading order: [`cli`] (what was typed) → [`plan`] (who computes what; pure) → [`cluster`] (the command that starts
//! it) → [`supervise`] (watching it) → exit code. The launcher knows no tensors; it runs the `trainer` that lies beside
//! its own executable.

mod cli;
mod cluster;
mod machine;
mod plan;
mod supervise;

use std::process::ExitCode;

use clap::Parser;
use configs::{ConfigError, RunConfig, exit};

use crate::cli::Cli;
use crate::cluster::{NotBuilt, TrainerCall};
use crate::machine::Machine;
use crate::plan::{Plan, PlanError};

fn main() -> ExitCode {
    if supervise::run_as_guard_if_asked() {
        return ExitCode::SUCCESS;
    }
    let code = run(&Cli::parse()).unwrap_or_else(|error| {
        supervise::say(&format!("launcher: {error:#}"));
        code_of(&error)
    });
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn run(cli: &Cli) -> anyhow::Result<i32> {
    let config = RunConfig::load(&cli.config, &cli.set)?;
    let plan = Plan::new(&config, &cli.request(), &Machine::this_host())?;
    let trainer = TrainerCall::new(cli)?;
    let cluster = cluster::for_plan(&plan);
    let command = cluster.command(&plan, &trainer);
    if cli.dry_run {
        // A plan is worth seeing even where its engine is not built; it touches no store and no host.
        plan::show(&plan, command.as_ref(), cli.json);
        return Ok(exit::OK);
    }
    for note in &plan.notes {
        supervise::say(&format!("launcher: note: {note}"));
    }
    let command = command?;
    trainer.check()?;
    supervise::run(&command, &plan)
}

/// Mistakes of the caller are told from failures of the run: repeating the same command would be useless.
fn code_of(error: &anyhow::Error) -> i32 {
    let usage = error.is::<ConfigError>() || error.is::<PlanError>() || error.is::<NotBuilt>();
    if usage { exit::USAGE } else { exit::FAILED }
}
