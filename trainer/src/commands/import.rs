//! `trainer import`: a run that goes on from someone else's weights.

use crate::ema::Average;
use crate::engine::data::open_data;
use crate::interop::origin::Origin;
use crate::interop::train_file::MOMENTS;
use crate::model::ParamSpec;
use anyhow::{Context, Result, bail};
use checkpoint::{AttemptInfo, Commit, F32Bytes, RunStore, ShardId, ShardRecord, Slice};
use configs::RunConfig;
use serde_json::{Value, json};
use std::path::PathBuf;

/// Values are read and written in shards of about this many bytes, so that memory stays small.
const SHARD_BYTES: usize = 1 << 30;

/// Options of `trainer import`.
#[derive(clap::Args)]
pub struct ImportArgs {
    /// The config of the run to be made.
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// A torch.save file (a state dict, or what train.py of DiT, fast-DiT or SiT saves), a safetensors file, a diffusers
    /// folder, or a checkpoint of another run.
    #[arg(long, value_name = "PATH")]
    from: String,
    /// Overrides of config keys.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Step that the run goes on from; the optimizer's own step when not given, 0 where there is none.
    #[arg(long)]
    step: Option<u64>,
    /// Leave the source's optimizer state behind and start with fresh moments.
    #[arg(long)]
    no_optimizer: bool,
}

/// A tensor of the checkpoint to be: section and parameter.
type Entry<'a> = (String, &'a (String, ParamSpec));

/// Makes the run folder with one checkpoint, from which the launcher goes on.
///
/// # Errors
/// A source that cannot be read or is of another model; a run folder with checkpoints in it.
pub fn import(args: &ImportArgs) -> Result<()> {
    let config = RunConfig::load(&args.config, &args.overrides)?;
    let (_, recipe) = open_data(&config)?;
    if recipe.lora.is_some() || config.init.is_some() {
        bail!("the config has `[lora]` or `[init]`: such a run takes other weights from `init.from`, not by import");
    }
    let params = recipe.build_model()?.named_params();
    let origin = Origin::open(&args.from, &params, !args.no_optimizer).context("--from")?;
    let optimizer_step = origin.optimizer_step();
    let step = args.step.unwrap_or(optimizer_step);
    if step > config.train.steps {
        bail!(
            "the run would go on from step {step}, beyond `train.steps` = {}; raise it or give --step",
            config.train.steps
        );
    }

    let store = RunStore::open(&config.run.url).context("`run.url`")?;
    if let Some(commit) = store.committed()?.first() {
        bail!("{} has checkpoints already (the newest of step {}); give a new `run.url`", store.url(), commit.step);
    }
    let mut entries: Vec<Entry> = Vec::new();
    for (section, with_frozen) in sections(&config) {
        let in_section = params.iter().filter(|(_, spec)| spec.trainable || with_frozen);
        entries.extend(in_section.map(|param| (section.clone(), param)));
    }
    let groups = shards(&entries);
    let info = AttemptInfo {
        resumed_from: None,
        world_size: groups.len(),
        details: json!({"imported_from": configs::location::redact(&args.from)}),
    };
    let attempt = store.claim_attempt(&info)?;
    let mut written = Vec::with_capacity(groups.len());
    for (rank, group) in groups.iter().enumerate() {
        let id = ShardId { attempt, step, rank, world_size: groups.len() };
        written.push(write_shard(&store, &id, group, &origin)?);
    }
    let manifest = store.commit(Commit {
        attempt,
        step,
        optimizer_step,
        config: recipe.record(&config),
        decision_log: Value::Array(Vec::new()),
        shards: written,
        ..Default::default()
    })?;

    if Average::of_config(&config.ema).len() > 1 {
        println!("note: all averages of `[ema]` begin as the source's one");
    }
    origin.notes.iter().for_each(|note| println!("note: {note}"));
    if let Some(theirs) = origin.numerics.filter(|theirs| *theirs != recipe.model.numerics) {
        println!(
            "note: the source counts as {theirs:?}; `model.numerics` of the config means {:?}",
            recipe.model.numerics
        );
    }
    if optimizer_step == 0 {
        println!("note: no optimizer state, so AdamW's moments start from zero");
    }
    for difference in origin.optimizer_settings().map(|theirs| differences(theirs, &config)).unwrap_or_default() {
        println!("note: {difference}");
    }
    println!("step {step}, optimizer step {optimizer_step}: {}/{}", store.url(), manifest.key());
    Ok(())
}

/// The sections of a run's checkpoints, and whether frozen parameters are in them.
fn sections(config: &RunConfig) -> Vec<(String, bool)> {
    let averages = Average::of_config(&config.ema).into_iter().map(|average| (average.section, true));
    let moments = MOMENTS.map(|(section, _)| (section.to_owned(), false));
    std::iter::once(("model".to_owned(), true)).chain(averages).chain(moments).collect()
}

/// Cuts the list into parts of at most [`SHARD_BYTES`], or of one tensor.
fn shards<'e, 'a>(entries: &'e [Entry<'a>]) -> Vec<&'e [Entry<'a>]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (at, (_, (_, spec))) in entries.iter().enumerate() {
        let next = spec.numel() * size_of::<f32>();
        if at > start && bytes + next > SHARD_BYTES {
            shards.push(&entries[start..at]);
            (start, bytes) = (at, 0);
        }
        bytes += next;
    }
    shards.push(&entries[start..]);
    shards
}

fn write_shard(store: &RunStore, id: &ShardId, entries: &[Entry], origin: &Origin) -> Result<ShardRecord> {
    let mut tensors = Vec::with_capacity(entries.len());
    for (section, (name, spec)) in entries {
        let shape: Vec<usize> = spec.shape.iter().map(|&side| side as usize).collect();
        let values = std::sync::Arc::new(origin.values(section, name, spec)?);
        tensors.push((format!("{section}/{name}"), shape, F32Bytes::shared(&values, 0..values.len())));
    }
    let slices: Vec<Slice> =
        tensors.iter().map(|(name, shape, data)| Slice { name, shape, start_numel: 0, data: data.clone() }).collect();
    Ok(store.write_shard(id, &slices)?)
}

/// Where the source's optimizer settings are not the config's.
fn differences(theirs: &Value, config: &RunConfig) -> Vec<String> {
    let ours = &config.optimizer;
    let pairs = [
        ("lr", theirs["lr"].as_f64(), ours.lr),
        ("betas[0]", theirs["betas"][0].as_f64(), ours.betas[0]),
        ("betas[1]", theirs["betas"][1].as_f64(), ours.betas[1]),
        ("eps", theirs["eps"].as_f64(), ours.eps),
        ("weight_decay", theirs["weight_decay"].as_f64(), ours.weight_decay),
    ];
    let differs = |(key, theirs, ours): (&str, Option<f64>, f64)| {
        let theirs = theirs.filter(|theirs| *theirs != ours)?;
        Some(format!("the source's optimizer had {key} = {theirs}; the config has `optimizer.{key}` = {ours}"))
    };
    let mut differences: Vec<String> = pairs.into_iter().filter_map(differs).collect();
    if theirs["amsgrad"].as_bool() == Some(true) {
        differences.push("the source's optimizer was AMSGrad; its running maxima are left behind".to_owned());
    }
    differences
}
