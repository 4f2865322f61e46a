//! `latents`: looks into latent data sets and checks them. One file a subcommand.

mod inspect;
mod place;
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
    /// Read a whole data set and tell what it holds.
    Inspect(inspect::InspectArgs),
    /// Decode every page and name each problem; fails if there is one.
    Verify(verify::VerifyArgs),
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Inspect(args) => inspect::run(&args),
        Command::Verify(args) => verify::run(&args),
    };
    done.unwrap_or_else(|error| {
        eprintln!("latents: {error:#}");
        ExitCode::from(configs::exit::FAILED as u8)
    })
}
