//! `latents bench`.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use data_loader::{CaptionOptions, Flip, MicroBatchStream, PlainMemory, ScheduleOptions, StreamOptions, StreamSource};

use crate::place::Place;

#[derive(Args)]
pub struct BenchArgs {
    #[command(flatten)]
    place: Place,
    /// Threads that read and decode (`data.threads`).
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// For how long; after a second of warming up.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Lanes of the rank (`train.lanes`).
    #[arg(long, default_value_t = 1)]
    lanes: usize,
    /// Rows of a lane at a step (`train.micro_batch`).
    #[arg(long, default_value_t = 256)]
    micro_batch: usize,
    /// Rows that are dealt as one piece (`data.range_rows`).
    #[arg(long, default_value_t = 256)]
    range_rows: usize,
    /// Rows that are shuffled among each other (`data.shuffle_window_rows`).
    #[arg(long, default_value_t = 4096)]
    shuffle_window_rows: usize,
    /// Bound of the read-ahead (`data.prefetch_bytes`).
    #[arg(long, default_value_t = 64 << 20)]
    prefetch_bytes: usize,
    /// Read captions, too, and pad or cut them to so many tokens (`data.caption_tokens`).
    #[arg(long, value_name = "N")]
    caption_tokens: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    let window = Duration::try_from_secs_f64(args.seconds)
        .map_err(|_| anyhow::anyhow!("--seconds {}: expected a number of seconds from 0 on", args.seconds))?;
    let dataset = Arc::new(args.place.open()?);
    let order = dataset.order(ScheduleOptions {
        seed: 0,
        lanes: args.lanes,
        micro_batch: args.micro_batch,
        range_rows: args.range_rows,
        shuffle_window_rows: args.shuffle_window_rows,
    })?;
    let options = StreamOptions {
        prefetch_bytes: args.prefetch_bytes,
        flip: Flip::Never,
        num_classes: None,
        captions: args.caption_tokens.map(|tokens| CaptionOptions { tokens, weights: Vec::new() }),
        threads: usize::from(args.threads),
        allocator: &PlainMemory,
    };
    let scaling_factor = dataset.scaling_factor(None)?;
    let name = dataset.name().to_owned();
    let sources = vec![StreamSource { dataset, scaling_factor }];
    let mut stream = MicroBatchStream::start(sources, order, 0..args.lanes, 0, u64::MAX, options)?;
    let mut take = |samples: &mut usize, bytes: &mut usize| -> anyhow::Result<()> {
        let batch = stream.next()?;
        *samples += batch.rows.len();
        let captions = batch.captions.as_ref().map_or(0, |captions| size_of_val(&captions.embeddings[..]));
        *bytes += batch.x_start.bytes().len() + captions;
        stream.recycle(batch);
        Ok(())
    };
    let warm = Instant::now();
    while warm.elapsed() < Duration::from_secs(1).min(window) {
        take(&mut 0, &mut 0)?;
    }
    let (mut samples, mut bytes, started) = (0, 0, Instant::now());
    while started.elapsed() < window {
        take(&mut samples, &mut bytes)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let (samples_per_s, bytes_per_s, peak_rss) = (samples as f64 / seconds, bytes as f64 / seconds, peak_rss());
    if args.json {
        let line = serde_json::json!({
            "samples_per_s": samples_per_s, "bytes_per_s": bytes_per_s, "peak_rss_bytes": peak_rss,
            "threads": args.threads, "seconds": seconds, "samples": samples,
        });
        println!("{line}");
    } else {
        println!("{name}: {} thread(s), micro-batches of {}, {seconds:.1} s", args.threads, args.micro_batch);
        println!("  samples/s  {samples_per_s:.0}");
        println!("  MB/s       {:.1} (latents and captions as they are handed over)", bytes_per_s / 1e6);
        match peak_rss {
            Some(bytes) => println!("  peak RSS   {:.1} MB", bytes as f64 / 1e6),
            None => println!("  peak RSS   not told by this system"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The most memory that this process has had, in bytes, where the system tells.
fn peak_rss() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
