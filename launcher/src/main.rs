//! `launcher`: plans a run, starts its ranks on an engine, watches them until they end.
//!
//! Reading order: [`cli`] (what was typed) → [`plan`] (who computes what; pure) and [`forecast`] (what that will take) → [`cluster`] (the command that starts
//! it) → [`runner`] (again, if it fails) → [`supervise`] (watching it; [`status`] keeps what it sees) → exit code. The launcher knows no tensors; it runs the `trainer` that lies beside
//! its own executable.

mod cli;
mod cluster;
mod forecast;
mod machine;
mod plan;
mod runner;
mod status;
mod supervise;
mod topology;

use std::ffi::OsString;
use std::io::{ErrorKind, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use configs::{ConfigError, RunConfig, exit};
use estimate::HardwareError;

use crate::cli::Cli;
use crate::cluster::{ClusterError, Handover, Start, TrainerCall};
use crate::forecast::{Asked, Forecast};
use crate::machine::Machine;
use crate::plan::{Plan, PlanError};
use crate::runner::Runner;
use crate::status::Status;
use crate::status::server::ServerError;

fn main() -> ExitCode {
    if supervise::run_as_guard_if_asked() {
        return ExitCode::SUCCESS;
    }
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|command| command == STATUS) {
        let error = status_of_run(arguments.collect());
        supervise::say(&format!("launcher: {error:#}"));
        return ExitCode::FAILURE;
    }
    let code = run(&Cli::parse_from(cli::spelled_out(std::env::args_os()))).unwrap_or_else(|error| {
        supervise::say(&format!("launcher: {error:#}"));
        code_of(&error)
    });
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn run(cli: &Cli) -> anyhow::Result<i32> {
    let config = RunConfig::load(&cli.config, &cli.overrides())?;
    let request = cli.request()?;
    let plan = Plan::new(&config, &request, &Machine::this_host())?;
    let trainer = TrainerCall::new(cli)?;
    let start = cluster::for_plan(&plan, &config).start(&plan, &trainer);
    if cli.dry_run {
        // A plan is worth seeing even where something is missing for its start; it touches no store and no host.
        let forecast = Forecast::new(&config, &plan, &Asked::of(cli)?)?;
        return match plan::show(&plan, start.as_ref(), forecast.as_ref(), cli.json) {
            // Who has read enough of it closes the pipe.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(exit::OK),
            shown => Ok(shown.map(|()| exit::OK)?),
        };
    }
    match start? {
        Start::Engine(_) => {
            trainer.check()?;
            let status = Arc::new(Status::new(cli.status_file.as_deref())?);
            if let Some(address) = cli.status_addr {
                let address = status::server::start(address, status.clone())?;
                supervise::say(&format!("launcher: status at http://{address}/"));
            }
            Runner { config: &config, request, trainer: &trainer, status }.run(cli.restarts)
        }
        Start::Handover(handover) => hand_over(&handover),
    }
}

/// The command that needs no config.
const STATUS: &str = "status";

/// Becomes `trainer status`, which reads a run from its store; gives why it cannot.
fn status_of_run(options: Vec<OsString>) -> anyhow::Error {
    let trainer = match std::env::current_exe() {
        Ok(this) => this.with_file_name("trainer"),
        Err(error) => return anyhow::Error::new(error).context("cannot find the launcher's own executable"),
    };
    let error = Command::new(&trainer).arg(STATUS).args(options).exec();
    anyhow::Error::new(error).context(format!("{}: cannot be started; build it with ./dev build", trainer.display()))
}

/// Gives the text to the scheduler, or to whoever reads the output.
fn hand_over(Handover { text, submit }: &Handover) -> anyhow::Result<i32> {
    let Some((program, arguments)) = submit.split_first() else {
        std::io::stdout().write_all(text.as_bytes()).context("writing the manifest")?;
        return Ok(exit::OK);
    };
    let mut process = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}; is this a login node of the cluster?", program.display()))?;
    if let Some(mut stdin) = process.stdin.take() {
        // A program that does not read says why itself.
        let _ = stdin.write_all(text.as_bytes());
    }
    let ended = process.wait().with_context(|| format!("waiting for {}", program.display()))?;
    anyhow::ensure!(ended.success(), "{} refused the job ({ended})", program.display());
    Ok(exit::OK)
}

/// Mistakes of the caller are told from failures of the run: repeating the same command would be useless.
fn code_of(error: &anyhow::Error) -> i32 {
    let usage = error.is::<ConfigError>()
        || error.is::<ServerError>()
        || error.is::<PlanError>()
        || error.is::<ClusterError>()
        || error.is::<HardwareError>();
    if usage { exit::USAGE } else { exit::FAILED }
}
