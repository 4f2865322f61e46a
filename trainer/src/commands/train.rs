//! `trainer train`: one rank of a run, started by the launcher.

use super::ranks::{conclude, end_with_parent};
use crate::engine::agree::Agreed;
use crate::engine::decisions::DecisionLog;
use crate::engine::rank::Rank;
use crate::engine::run::{Outcome, run};
use crate::engine::saver::SaveFailed;
use crate::engine::stepper::StepError;
use crate::engine::stop::StopFlag;
use crate::telemetry::{Heartbeat, Trace, TraceArgs};
use anyhow::{Context, Result};
use collective::Collective;
use configs::phases::{self, Phase};
use configs::spans::{Track, span};
use configs::{RunConfig, exit};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Options of `trainer train`.
#[derive(clap::Args)]
pub struct TrainArgs {
    /// The run's config.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Overrides of config keys.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    #[command(flatten)]
    trace: TraceArgs,
}

/// Trains to the end or to a stop request and gives the process's exit code.
///
/// # Errors
/// A config that cannot be used. Later failures are reported here, by one rank, because the others must be ended too.
pub fn train(args: &TrainArgs) -> Result<i32> {
    end_with_parent();
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let collective = collective::from_environment(Duration::from_secs(config.collective.timeout_s))?;
    let collective: Arc<dyn Collective> = collective.into();
    let _heartbeat = Heartbeat::start(collective.world_size());
    let mut trace = None;
    let outcome = attempts(args, &config, &collective, &mut trace);
    outcome.or_else(|error| {
        let is_agreed = is_agreed(&error);
        // It shows the way to the failure. Ranks that may wait for this one are not asked for their parts.
        match trace {
            Some(trace) if is_agreed || collective.world_size() == 1 => drop(trace.write(&*collective)),
            Some(trace) => trace.write_alone(collective.rank()),
            None => {}
        }
        Ok(conclude(&*collective, &error, is_agreed))
    })
}

/// Starts, and starts again from the newest checkpoint as often as the ranks roll back. Gives the exit code.
fn attempts(
    args: &TrainArgs,
    config: &RunConfig,
    collective: &Arc<dyn Collective>,
    trace: &mut Option<Trace>,
) -> Result<i32> {
    let stop = StopFlag::install().context("installing signal handlers")?;
    *trace = Trace::begin(&args.trace, &**collective)?;
    let mut decided = DecisionLog::default();
    loop {
        phases::enter(Phase::SetUp);
        let mut rank = {
            let _setting_up = span(Track::Compute, "set up", None);
            Rank::set_up(config.clone(), collective.clone(), stop.clone(), &decided)?
        };
        if let Some(trace) = trace {
            trace.of_attempt(rank.attempt, rank.resumed_from.unwrap_or(0));
        }
        match run(&mut rank, trace)? {
            Outcome::RolledBack => decided = rank.stepper.decisions.clone(),
            Outcome::Done => return Ok(exit::OK),
            Outcome::Stopped => return Ok(exit::RESUMABLE),
        }
    }
}

/// Whether all ranks came to this error together, after agreeing on what happened.
fn is_agreed(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StepError::Diverged(_) | StepError::TooMuchDamage { .. }))
        || error.is::<SaveFailed>()
        || error.is::<Agreed>()
}
