//! `latents inspect`.

use std::process::ExitCode;

use clap::Args;
use data_loader::Inspection;

use crate::place::Place;

#[derive(Args)]
pub struct InspectArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let inspection = data_loader::inspect(&args.place.open()?)?;
    if args.json {
        println!("{}", serde_json::to_string(&inspection)?);
    } else {
        print(&inspection);
    }
    Ok(ExitCode::SUCCESS)
}

fn print(found: &Inspection) {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "not given".into());
    println!("{}", found.url);
    println!("  rows            {}", found.rows);
    println!("  files           {} ({} row groups)", found.files, found.row_groups);
    match &found.shapes[..] {
        [] => println!("  latent shape    {:?}", found.latent_shape),
        shapes => {
            shapes.iter().for_each(|shape| println!("  latent shape    {:?} in {} rows", shape.shape, shape.rows))
        }
    }
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
