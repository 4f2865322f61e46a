//! `trainer validate`: the held-out loss of a checkpoint, by one process or by all ranks of a world.

use super::ranks::{ConfigArgs, load_weights, open_together, together};
use crate::device::DeviceChoice;
use crate::engine::agree::agree;
use crate::ffi;
use crate::model::Model;
use crate::recipe::Recipe;
use crate::validation::{HeldOut, HeldOutLoss};
use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointReader, Manifest};
use collective::Collective;
use configs::{Columns, RunConfig, ValidationConfig, location};
use data_loader::OpenOptions;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tch::Device;

/// Options of `trainer validate`. What is not given is taken from `[validation]` of the run's config.
#[derive(clap::Args)]
pub struct ValidateArgs {
    /// A run folder (its newest valid checkpoint), or one checkpoint of it (`<run>/checkpoints/step-000001000`,
    /// `<run>/checkpoints/best`); the run of --config when not given.
    #[arg(long, value_name = "URL", required_unless_present = "config")]
    checkpoint: Option<String>,
    #[command(flatten)]
    run: ConfigArgs,
    /// Held-out data set [default: validation.url of --config, else of the checkpoint's run].
    #[arg(long, value_name = "URL")]
    data: Option<String>,
    /// Which weights: ema, model, or the section of a further EMA.
    #[arg(long, value_name = "SECTION,…", value_delimiter = ',')]
    weights: Vec<String>,
    /// Most rows that are judged, evenly spaced over the data set.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rows: Option<u32>,
    /// Draws of time and noise on every row.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    draws: Option<u32>,
    /// Equal parts of the diffusion's time.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    bins: Option<u32>,
    /// Draws judged at once.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    batch: Option<u32>,
    /// Seed of times, noise and posterior samples.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// CPU threads of each rank [default: train.threads_per_rank of the run, so that losses have the bits of the run].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

/// Judges the weights, together with the other ranks of the world where there are any, and gives the exit code.
///
/// # Errors
/// A config that cannot be used. Later failures are reported here, by one rank, because the others must be
/// ended too.
pub fn validate(args: &ValidateArgs) -> Result<i32> {
    together(&args.run, Duration::ZERO, |config, collective| judge(args, config, collective))
}

fn judge(args: &ValidateArgs, config: Option<&RunConfig>, collective: &dyn Collective) -> Result<()> {
    let url = args.checkpoint.as_ref().or(config.map(|config| &config.run.url));
    let url = agree(collective, url.context("give --checkpoint URL or --config FILE"))?;
    let reader = open_together(url, collective)?;
    let prepared = agree(collective, Prepared::new(args, config, &reader, collective))?;
    let Prepared { config, held_out, model, device } = prepared;
    let mut losses = Vec::new();
    for section in &config.weights {
        let weights = agree(collective, load_weights(&reader, &*model, section, device))?;
        losses.push((section.clone(), held_out.judge(&weights, collective)?));
    }
    if collective.rank() == 0 {
        match args.json {
            true => println!("{:#}", as_json(&config, held_out.row_count(), reader.manifest().step, &losses)),
            false => print(&config, held_out.row_count(), reader.manifest().step, &losses),
        }
    }
    Ok(())
}

/// What a rank has before it judges.
struct Prepared {
    config: ValidationConfig,
    held_out: HeldOut,
    model: Arc<dyn Model>,
    device: Device,
}

impl Prepared {
    fn new(
        args: &ValidateArgs,
        run: Option<&RunConfig>,
        reader: &CheckpointReader,
        collective: &dyn Collective,
    ) -> Result<Self> {
        let record = &reader.manifest().config;
        let recorded_threads = record["train"]["threads_per_rank"].as_i64().map(|threads| threads as i32);
        tch::set_num_threads(args.threads.or(recorded_threads).unwrap_or(1).max(1));
        tch::set_num_interop_threads(1);
        ffi::set_deterministic(record["train"]["tf32"].as_bool().unwrap_or(false))?;
        let device = args.device.device(collective.local_rank())?;
        let config = args.validation(run, reader.manifest())?;
        let columns = serde_json::from_value::<Columns>(record["data"]["columns"].clone()).unwrap_or_default();
        let recipe = Recipe::of_manifest(record)?;
        let model = recipe.build_model()?;
        let place = (collective.rank(), collective.world_size());
        let held_out = HeldOut::open(&config, &OpenOptions::of(&columns), &recipe, model.clone(), device, place)?;
        if let Some(warning) = held_out.warning.as_ref().filter(|_| collective.rank() == 0) {
            eprintln!("trainer: warning: {warning}");
        }
        Ok(Self { config, held_out, model, device })
    }
}

impl ValidateArgs {
    /// The `[validation]` of the config, or of the checkpoint's run, with what the options say otherwise.
    fn validation(&self, run: Option<&RunConfig>, manifest: &Manifest) -> Result<ValidationConfig> {
        let here = std::env::current_dir().context("the current folder")?;
        let recorded = manifest.config.get("validation").filter(|recorded| !recorded.is_null());
        let recorded = recorded.map(|recorded| serde_json::from_value::<ValidationConfig>(recorded.clone()));
        let recorded = recorded.transpose().context("`validation` in the checkpoint's config")?;
        let recorded = run.and_then(|run| run.validation.clone()).or(recorded);
        let given = self.data.as_ref().map(|url| location::resolve(&here, url));
        let mut config = match (recorded, given) {
            (Some(recorded), Some(url)) => ValidationConfig { url, ..recorded },
            (Some(recorded), None) => recorded,
            (None, Some(url)) => ValidationConfig::of(url),
            (None, None) => bail!("the checkpoint's config has no `validation.url`; give --data URL"),
        };
        let set = |target: &mut usize, given: Option<u32>| *target = given.map_or(*target, |given| given as usize);
        set(&mut config.rows, self.rows);
        set(&mut config.draws, self.draws);
        set(&mut config.bins, self.bins);
        set(&mut config.batch, self.batch);
        config.seed = self.seed.unwrap_or(config.seed);
        if !self.weights.is_empty() {
            config.weights.clone_from(&self.weights);
        }
        Ok(config)
    }
}

fn as_json(config: &ValidationConfig, rows: usize, step: u64, losses: &[(String, HeldOutLoss)]) -> serde_json::Value {
    let of = |judged: &HeldOutLoss| json!({ "loss": judged.loss, "parts": judged.parts, "bins": judged.bins });
    let weights: serde_json::Map<_, _> = losses.iter().map(|(name, judged)| (name.clone(), of(judged))).collect();
    let url = location::redact(&config.url);
    json!({ "step": step, "data": url, "rows": rows, "draws": config.draws, "seed": config.seed, "weights": weights })
}

fn print(config: &ValidationConfig, rows: usize, step: u64, losses: &[(String, HeldOutLoss)]) {
    let ValidationConfig { draws, seed, bins, .. } = *config;
    println!("step {step}, {rows} rows × {draws} draw(s) of {}, seed {seed}", location::redact(&config.url));
    let line = |head: &str, value: &dyn Fn(&HeldOutLoss) -> String| {
        let cells: String = losses.iter().map(|(_, judged)| format!("{:>18}", value(judged))).collect();
        println!("{head:<14}{cells}");
    };
    let names: String = losses.iter().map(|(name, _)| format!("{name:>18}")).collect();
    println!("{:<14}{names}", "");
    line("loss", &|judged| format!("{:.6}", judged.loss));
    for part in losses.first().into_iter().flat_map(|(_, judged)| judged.parts.keys()) {
        line(part, &|judged| judged.parts.get(part).map_or_else(String::new, |value| format!("{value:.6}")));
    }
    for bin in 0..bins {
        let edge = |bin: usize| bin as f64 / bins as f64;
        let time = format!("{:.3}–{:.3}", edge(bin), edge(bin + 1));
        line(&time, &|judged| format!("{:.6}", judged.bins[bin]));
    }
    println!("(losses by time: 0 is data, 1 is noise)");
}
