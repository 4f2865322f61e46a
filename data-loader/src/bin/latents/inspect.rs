//! `latents inspect`.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use data_loader::{CaptionSummary, CountRange, InspectOptions, Inspection, LatentDataset, Layout, Spread};

use crate::place::Place;
use crate::progress;

/// Labels that are listed; of more, the smallest and the largest class.
const MAX_LABELS: usize = 20;

#[derive(Args)]
pub struct InspectArgs {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Read only footers and a sample of the rows: no digest, and statistics of the sample.
    #[arg(long)]
    quick: bool,
    /// Also draw rows from all over the data set into a PNG file.
    #[arg(long, value_name = "FILE.png")]
    preview: Option<PathBuf>,
    /// Rows in the preview.
    #[arg(long, value_name = "N", default_value_t = 64, requires = "preview")]
    preview_rows: u64,
    #[command(flatten)]
    place: Place,
}

pub fn run(args: &InspectArgs) -> anyhow::Result<ExitCode> {
    let dataset = args.place.open()?;
    if let Some(path) = &args.preview {
        draw(&dataset, args.preview_rows, path)?;
    }
    let bar = progress::bar(dataset.meta().rows);
    let inspection =
        data_loader::inspect_with(&dataset, InspectOptions { quick: args.quick }, &mut |rows| bar.set_position(rows))?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string(&inspection)?);
    } else {
        print(&inspection);
    }
    Ok(ExitCode::SUCCESS)
}

fn draw(dataset: &LatentDataset, rows: u64, path: &PathBuf) -> anyhow::Result<()> {
    let preview = data_loader::preview(dataset, rows)?;
    let png = preview.to_png().map_err(anyhow::Error::msg).with_context(|| format!("{}", path.display()))?;
    std::fs::write(path, png).with_context(|| format!("{}: cannot be written", path.display()))?;
    eprintln!(
        "latents: {}: {} × {} pixels, colours by {}",
        path.display(),
        preview.width,
        preview.height,
        preview.colours
    );
    Ok(())
}

fn print(found: &Inspection) {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "not given".into());
    println!("{}", found.url);
    println!("  rows            {}", found.rows);
    println!("  files           {} ({} row groups)", found.files, found.row_groups);
    match found.shapes.len() {
        0 => println!("  latent shape    {:?}", found.latent_shape),
        count => println!("  latent shape    {count} shapes"),
    }
    for count in &found.shapes {
        println!("    {:<20}{} rows", format!("{:?}", count.shape), count.rows);
    }
    println!(
        "  stored          {}{} as {}{}",
        if found.moments { "posterior mean and log-variance" } else { "latents" },
        if found.flipped { ", also of mirrored images" } else { "" },
        found.dtype,
        if found.row_bytes > 0 { format!(", {} bytes a row", found.row_bytes) } else { String::new() }
    );
    println!("  scaling factor  {}", or_none(found.scaling_factor.map(|factor| factor.to_string())));
    println!("  classes         {}", or_none(found.num_classes.map(|classes| classes.to_string())));
    println!("  VAE digest      {}", or_none(found.vae_digest.clone()));
    match &found.sha256_f32 {
        Some(digest) => println!("  sha256 (f32)    {digest}"),
        None => println!("  read            a sample of {} rows; the lines marked * tell of it alone", found.rows_read),
    }
    let mark = if found.sha256_f32.is_none() { "*" } else { "" };
    for (channel, stats) in found.channels.iter().enumerate() {
        println!("  channel {:<8}mean {:+.5}  std {:.5}", format!("{channel}{mark}"), stats.mean, stats.std);
    }
    if found.non_finite > 0 {
        println!("  not finite{mark:<6}{} numbers are NaN or infinite", found.non_finite);
    }
    if let Some(captions) = &found.captions {
        print_captions(captions, mark);
    }
    print_labels(found, mark);
    print_layout(&found.layout);
    let speed = &found.speed;
    println!(
        "  reading speed   {:.0} rows/s, an epoch in {}: {} rows from all over the data set by one thread in {:.2} s",
        speed.rows_per_s,
        duration(1.0 / speed.epochs_per_s),
        speed.rows,
        speed.seconds
    );
}

fn print_captions(captions: &CaptionSummary, mark: &str) {
    let most =
        captions.most_tokens.map_or("as many tokens as there are".into(), |most| format!("at most {most} tokens"));
    println!("  captions        {}: {most} of {} {}", captions.columns.join(", "), captions.dim, captions.dtype);
    for (name, range) in [
        ("of a row", captions.of_row),
        ("tokens of one", captions.tokens),
        ("that count", captions.tokens_that_count.filter(|_| captions.masked)),
    ] {
        if let Some(CountRange { min, mean, max }) = range {
            let text = if min == max { min.to_string() } else { format!("{min} to {max}, mean {mean:.1}") };
            println!("  {:<16}{text}", format!("  {name}{mark}"));
        }
    }
    if captions.non_finite > 0 {
        println!("  {:<16}{} numbers are NaN or infinite", format!("  not finite{mark}"), captions.non_finite);
    }
}

fn print_labels(found: &Inspection, mark: &str) {
    println!("  labels{mark:<10}{}", found.labels.len());
    if found.labels.len() <= MAX_LABELS {
        for (label, rows) in &found.labels {
            println!("  {label:>7}         {rows}");
        }
        return;
    }
    let (first, last) = (found.labels.keys().next(), found.labels.keys().next_back());
    if let (Some(first), Some(last)) = (first, last) {
        println!("                  from {first} to {last} (--json: each)");
    }
    for (word, chosen) in [
        ("fewest", found.labels.iter().min_by_key(|(_, rows)| **rows)),
        ("most", found.labels.iter().max_by_key(|(_, rows)| **rows)),
    ] {
        if let Some((label, rows)) = chosen {
            println!("                  {word} rows: {rows}, of label {label}");
        }
    }
}

fn print_layout(layout: &Layout) {
    let spread = |name: &str, spread: &Option<Spread>, text: fn(u64) -> String| {
        if let Some(Spread { min, median, max }) = *spread {
            let range = format!("{} to {}, median {}", text(min), text(max), text(median));
            println!("  {name:<16}{}", if min == max { text(min) } else { range });
        }
    };
    let list = |words: &BTreeSet<String>| words.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
    println!("  written by      {}", layout.created_by.iter().map(String::as_str).collect::<Vec<_>>().join(", "));
    println!("  bytes           {}", bytes(layout.total_file_bytes));
    spread("  a file", &layout.file_bytes, bytes);
    spread("  a row group", &layout.row_group_bytes, bytes);
    spread("  its rows", &layout.row_group_rows, |rows| rows.to_string());
    spread("  a latent page", &layout.latent_page_bytes, bytes);
    spread("  its rows", &layout.latent_page_rows, |rows| rows.to_string());
    println!(
        "  offset index    {} of {} column chunks of latents{}",
        layout.indexed_latent_chunks,
        layout.latent_chunks,
        if layout.indexed_latent_chunks < layout.latent_chunks {
            "; without it, reading a few rows takes the whole chunk"
        } else {
            ""
        }
    );
    println!("  columns");
    for column in &layout.columns {
        println!(
            "    {:<24}{:<8}{}; {}; {}; {} stored, {} decoded",
            column.name,
            column.role.unwrap_or("-"),
            column.data_type,
            list(&column.encodings),
            list(&column.compression),
            bytes(column.stored_bytes),
            bytes(column.decoded_bytes)
        );
    }
    println!("  metadata");
    for (key, value) in &layout.metadata {
        println!("    {key} = {value}");
    }
}

/// `12.3 MiB`
fn bytes(count: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let (mut value, mut unit) = (count as f64, "bytes");
    for larger in units {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    if unit == "bytes" { format!("{count} bytes") } else { format!("{value:.1} {unit}") }
}

/// `3.2 s`, `4.1 min`, `2.5 h`
fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.2} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    }
}
