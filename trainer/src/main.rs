//! `trainer`: one rank of a run, and the commands around it.

use clap::{Parser, Subcommand};
use trainer::{commands, encode};

/// Trains Diffusion Transformers on precomputed latents.
#[derive(Parser)]
#[command(name = "trainer", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// One rank of a training run; the launcher starts it.
    Train(commands::train::TrainArgs),
    /// Images to a parquet data set of VAE latents.
    Encode(encode::EncodeArgs),
    /// Images from a checkpoint.
    Sample(commands::sample::SampleArgs),
    /// FID, sFID, Inception Score, precision and recall of samples.
    Evaluate(commands::evaluate::EvaluateArgs),
    /// Loss of a checkpoint on held-out latents, by time.
    Validate(commands::validate::ValidateArgs),
    /// What would keep a run from running well: libraries, GPUs, memory, data, store, clocks, network.
    Doctor(commands::doctor::DoctorArgs),
    /// What a run has come to, from its folder alone: last step, loss, newest checkpoint.
    Status(commands::status::StatusArgs),
    /// Lists, verifies, tidies up and removes the checkpoints of a run.
    Checkpoints(commands::checkpoints::CheckpointsArgs),
    /// A run that goes on from a checkpoint of the official code, SiT, diffusers or a safetensors file.
    Import(commands::import::ImportArgs),
    /// A checkpoint as PyTorch, safetensors or diffusers read it.
    Export(commands::export::ExportArgs),
    /// What is in a checkpoint or file of weights: step, config, tensors and their statistics.
    Inspect(commands::inspect::InspectArgs),
    /// What the latents of a data set decode to, as a PNG.
    Preview(commands::preview::PreviewArgs),
    /// SHA-256 of a checkpoint's values.
    Digest(commands::digest::DigestArgs),
    /// Everything that a run of a config starts from and draws, for training the same in another program.
    Draws(commands::draws::DrawsArgs),
    /// A moving average of any width from those in a run's checkpoints.
    Ema(commands::ema::EmaArgs),
    /// Saves and loads a made-up state, for `./dev bench checkpoint`.
    BenchCheckpoint(commands::bench_checkpoint::BenchCheckpointArgs),
    /// Times the training step on made-up latents.
    BenchStep(commands::bench_step::BenchStepArgs),
}

fn main() {
    let outcome = match Cli::parse().command {
        Command::Train(args) => commands::train::train(&args),
        Command::Encode(args) => encode::run(args).map(|()| 0),
        Command::Sample(args) => commands::sample::sample(&args),
        Command::Evaluate(args) => commands::evaluate::evaluate(&args),
        Command::Validate(args) => commands::validate::validate(&args),
        Command::Doctor(args) => commands::doctor::doctor(&args),
        Command::Status(args) => commands::status::status(&args).map(|()| 0),
        Command::Checkpoints(args) => commands::checkpoints::checkpoints(&args).map(|()| 0),
        Command::Import(args) => commands::import::import(&args).map(|()| 0),
        Command::Export(args) => commands::export::export(&args).map(|()| 0),
        Command::Inspect(args) => commands::inspect::inspect(&args).map(|()| 0),
        Command::Preview(args) => commands::preview::preview(&args).map(|()| 0),
        Command::Digest(args) => commands::digest::digest(&args).map(|()| 0),
        Command::Draws(args) => commands::draws::draws(&args).map(|()| 0),
        Command::Ema(args) => commands::ema::ema(&args).map(|()| 0),
        Command::BenchCheckpoint(args) => commands::bench_checkpoint::bench_checkpoint(&args).map(|()| 0),
        Command::BenchStep(args) => commands::bench_step::bench_step(&args).map(|()| 0),
    };
    std::process::exit(outcome.unwrap_or_else(|error| {
        eprintln!("trainer: error: {error:#}");
        configs::exit::FAILED
    }));
}
