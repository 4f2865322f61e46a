//! `latents`: looks into latent data sets and checks them. One file a subcommand.

mod bench;
mod inspect;
mod place;
mod progress;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Look into data sets of latents and check them.
#[derive(Parser)]
#[command(name = "latents", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell what a data set holds, how it is laid out, and draw it.
    Inspect(inspect::InspectArgs),
    /// Read micro-batches in the order of a training and say how fast that goes.
    Bench(bench::BenchArgs),
    /// Read every page and name each problem; fails if there is one.
    Verify(verify::VerifyArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("latents: {error:#}");
        ExitCode::from(configs::exit::FAILED as u8)
    })
}
