//! `latents`: looks into latent data sets and checks them.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use data_loader::{Columns, Inspection, LatentDataset};

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
    Inspect {
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        place: Place,
    },
    /// Decode every page and name each problem; fails if there is one.
    Verify {
        #[command(flatten)]
        place: Place,
    },
}

/// Which data set, and what its columns are called.
#[derive(Args)]
struct Place {
    /// A .parquet file, a folder, or a URL (file://, s3://, gs://, az://, https://).
    url: String,
    /// Name of a column, as `latent_mean=mu`; keys: latent, latent_mean, latent_logvar, latent_flipped, label, id.
    #[arg(long = "column", value_name = "KEY=NAME")]
    columns: Vec<String>,
}

impl Place {
    fn open(&self) -> anyhow::Result<LatentDataset> {
        let mut columns = Columns::default();
        for text in &self.columns {
            let (key, name) = text.split_once('=').with_context(|| format!("--column {text}: expected KEY=NAME"))?;
            let column = match key {
                "latent" => &mut columns.latent,
                "latent_mean" => &mut columns.latent_mean,
                "latent_logvar" => &mut columns.latent_logvar,
                "latent_flipped" => &mut columns.latent_flipped,
                "label" => &mut columns.label,
                "id" => &mut columns.id,
                _ => anyhow::bail!(
                    "--column {text}: unknown key `{key}`; expected latent, latent_mean, latent_logvar, latent_flipped, label or id"
                ),
            };
            *column = name.to_owned();
        }
        Ok(LatentDataset::open(&self.url, &columns)?)
    }
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("latents: {error:#}");
            ExitCode::from(configs::exit::FAILED as u8)
        }
    }
}

fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Inspect { json, place } => {
            let inspection = data_loader::inspect(&place.open()?)?;
            if *json {
                println!("{}", serde_json::to_string(&inspection)?);
            } else {
                print(&inspection);
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Verify { place } => {
            let dataset = place.open()?;
            let problems = data_loader::verify(&dataset);
            for problem in &problems {
                eprintln!("{problem}");
            }
            let meta = dataset.meta();
            if problems.is_empty() {
                println!(
                    "{}: good: {} rows in {} row groups of {} files",
                    dataset.name(),
                    meta.rows,
                    meta.row_groups,
                    meta.files
                );
                return Ok(ExitCode::SUCCESS);
            }
            eprintln!("{}: {} problems in {} rows", dataset.name(), problems.len(), meta.rows);
            Ok(ExitCode::from(configs::exit::FAILED as u8))
        }
    }
}

fn print(found: &Inspection) {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "not given".into());
    println!("{}", found.url);
    println!("  rows            {}", found.rows);
    println!("  files           {} ({} row groups)", found.files, found.row_groups);
    println!("  latent shape    {:?}", found.latent_shape);
    println!(
        "  stored          {}{} as {}, {} bytes a row",
        if found.moments { "posterior mean and log-variance" } else { "latents" },
        if found.flipped { ", also of mirrored images" } else { "" },
        found.dtype,
        found.row_bytes
    );
    println!("  scaling factor  {}", or_none(found.scaling_factor.map(|factor| factor.to_string())));
    println!("  classes         {}", or_none(found.num_classes.map(|classes| classes.to_string())));
    println!("  VAE digest      {}", or_none(found.vae_digest.clone()));
    println!("  sha256 (f32)    {}", found.sha256_f32);
    for (channel, stats) in found.channels.iter().enumerate() {
        println!("  channel {channel:<7} mean {:+.5}  std {:.5}", stats.mean, stats.std);
    }
    println!("  labels          {}", found.labels.len());
    for (label, rows) in &found.labels {
        println!("  {label:>7}         {rows}");
    }
}
