//! Runs the conformance suite, or one of the scenarios that tests look at from outside, on the collective of the engine that
//! started it, for example `mpirun -n 2 collective-conformance --backend nccl`.

mod scenarios;
mod stream_order;

use clap::{Parser, ValueEnum};
use collective::conformance::{Host, Memory, run};
use collective::mpi::{MpiCollective, MpiOptions};
use collective::nccl::{NcclCollective, NcclOptions};
use collective::{Collective, CollectiveError};
use std::io::Write;
use std::time::Duration;

#[derive(Parser)]
struct Args {
    /// What moves the data.
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    backend: Backend,
    /// Seconds that a wait may last.
    #[arg(long, default_value_t = 60.0)]
    deadline_s: f64,
    /// The most elements that one call of the backend moves.
    #[arg(long)]
    chunk_numel: Option<usize>,
    /// What to do.
    #[arg(long, value_enum, default_value_t = Scenario::Suite)]
    scenario: Scenario,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Backend {
    /// Host memory, by what started this process.
    Auto,
    /// GPU memory.
    Nccl,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Scenario {
    /// The conformance suite.
    Suite,
    /// Rank 1 comes two seconds late; the others say how much processor time their waiting took.
    Idle,
    /// The last rank never comes; the others say what they are told.
    Stall,
    /// The last rank dies; the others wait for it.
    Die,
    /// Every rank makes two reductions and says what it is told.
    Told,
    /// As before, but the last rank gathers where the others reduce.
    Odd,
}

fn main() {
    let args = Args::parse();
    let outcome = match args.backend {
        Backend::Auto => host(&args),
        Backend::Nccl => device(&args),
    };
    if let Err(error) = outcome {
        say(error);
        std::process::exit(1);
    }
}

/// In one write, because several ranks may have something to say.
fn say(error: impl std::fmt::Display) {
    let line = format!("collective-conformance: {error}\n");
    // There is nobody to tell that nobody can be told.
    let _ = std::io::stderr().write_all(line.as_bytes());
}

fn host(args: &Args) -> Result<(), CollectiveError> {
    let deadline = Duration::from_secs_f64(args.deadline_s);
    let collective = match args.chunk_numel {
        None => collective::from_environment(deadline)?,
        Some(chunk_numel) => Box::new(MpiCollective::init(MpiOptions { deadline, chunk_numel })?),
    };
    finish(args, &*collective, &Host, || Ok(()));
    Ok(())
}

fn device(args: &Args) -> Result<(), CollectiveError> {
    let deadline = Duration::from_secs_f64(args.deadline_s);
    let control = collective::from_environment(deadline)?;
    let ordinal = control.local_rank();
    let mut options =
        NcclOptions { caller_stream: stream_order::caller_stream(), ..NcclOptions::new(ordinal, deadline) };
    options.chunk_numel = args.chunk_numel.unwrap_or(options.chunk_numel);
    let collective = NcclCollective::init(control.into(), options)?;
    let memory = collective.memory();
    finish(args, &collective, &memory, || stream_order::check(&collective, ordinal));
    Ok(())
}

/// Does what is asked for, and ends all ranks when one finds something wrong.
fn finish(args: &Args, collective: &dyn Collective, memory: &dyn Memory, more: impl FnOnce() -> Result<(), String>) {
    let outcome = match args.scenario {
        Scenario::Suite => run(collective, memory).and_then(|()| more()).map(|()| {
            let (rank, world_size) = (collective.rank(), collective.world_size());
            println!("rank {rank} of {world_size}: ok ({})", collective.backend());
        }),
        other => scenarios::play(other, collective, memory).map_err(|error| error.to_string()),
    };
    if let Err(reason) = outcome {
        say(reason);
        collective.abort(1);
    }
}
