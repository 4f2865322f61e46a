//! `latents`: looks into latent data sets, checks and converts them. One file a subcommand.

mod bench;
mod export;
mod import;
mod inspect;
mod layout;
mod place;
mod progress;
mod verify;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Look into data sets of latents, check and convert them.
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
    /// Turn latents of another program into a data set, or lay a data set out anew.
    Import(Box<import::ImportArgs>),
    /// Write a data set as plain parquet or in the format of another program.
    Export(Box<export::ExportArgs>),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Import(args) => import::run(&args),
        Command::Export(args) => export::run(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("latents: {error:#}");
        ExitCode::from(configs::exit::FAILED as u8)
    })
}
