//! What a run reads: its data sets, and this rank's micro-batches of them.

use super::cache::open_options;
use super::decisions::DecisionLog;
use super::stepper::Experiment;
use crate::ffi::batch_memory;
use crate::recipe::Recipe;
use anyhow::{Context, Result};
use configs::{OnBroken, RunConfig};
use data_loader::{
    BrokenGroup, CaptionOptions, Damage, LatentDataset, MicroBatchStream, MixedSource, OpenOptions, RowOrder,
    ScheduleOptions, StreamOptions, StreamSource,
};
use std::sync::Arc;

/// Opens the data sets of a config, which reads their metadata only, and settles what the config leaves to them.
///
/// # Errors
/// A data set that cannot be read or contradicts the config or another one.
pub fn open_data(config: &RunConfig) -> Result<(Vec<StreamSource>, Recipe)> {
    let mut sources = Vec::new();
    let of_config = config.data.sources();
    let options = open_options(config, of_config.iter().flat_map(|source| source.url.iter()))?;
    for (number, source) in of_config.iter().enumerate() {
        let key = match config.data.url {
            Some(_) => "`data.url`".to_owned(),
            None => format!("`data.mix[{number}].url`"),
        };
        let options = OpenOptions { columns: source.columns.clone(), ..options.clone() };
        let dataset = LatentDataset::open_all(source.url.iter(), &options).context(key)?;
        let scaling_factor = dataset.scaling_factor(source.scaling_factor)?;
        sources.push(StreamSource { dataset: Arc::new(dataset), scaling_factor });
    }
    let recipe = Recipe::resolve(config, &sources)?;
    Ok((sources, recipe))
}

/// Says where the sources of a mix may be latents of different VAEs, and what is read in vain.
pub fn warnings(config: &RunConfig, sources: &[StreamSource]) -> Vec<String> {
    let digest = |source: &StreamSource| source.dataset.meta().vae_digest.clone();
    let known = sources.iter().filter_map(|source| Some((source.dataset.name(), digest(source)?)));
    let known: Vec<(&str, String)> = known.collect();
    let others = known.iter().skip(1).filter(|(_, digest)| *digest != known[0].1);
    let tell = |(name, found): &(&str, String)| {
        let (first, expected) = &known[0];
        format!(
            "`data.mix`: {name} was made by the VAE {found}, {first} by {expected}; right only if their encoders are the same"
        )
    };
    let in_vain = "`data.caption_tokens`: captions are read, but this model takes none";
    let in_vain = config.data.caption_tokens.map(|_| in_vain.to_owned());
    others.map(tell).chain(in_vain).collect()
}

/// The order in which rows are read, by all ranks together.
///
/// # Errors
/// Fewer rows than the lanes need.
pub fn row_order(config: &RunConfig, sources: &[StreamSource]) -> Result<RowOrder> {
    let options = ScheduleOptions {
        seed: config.seed,
        lanes: config.train.lanes,
        micro_batch: config.train.micro_batch,
        range_rows: config.data.range_rows as usize,
        shuffle_window_rows: config.data.shuffle_window_rows as usize,
    };
    if config.data.mix.is_empty() {
        return Ok(sources[0].dataset.order(options)?);
    }
    let mixed = |(source, of_config): (&StreamSource, &configs::DataSource)| MixedSource {
        weight: of_config.weight,
        row_group_rows: source.dataset.row_groups().iter().map(|group| group.rows).collect(),
    };
    let mixed: Vec<MixedSource> = sources.iter().zip(&config.data.mix).map(mixed).collect();
    Ok(RowOrder::mixed(options, &mixed)?)
}

/// What this rank's micro-batches are made from.
pub struct Data {
    /// The data sets.
    pub sources: Vec<StreamSource>,
    /// The order in which all ranks together read rows.
    pub order: RowOrder,
    /// Labels lie below it.
    pub num_classes: usize,
    /// This rank's lanes and device.
    pub experiment: Experiment,
}

impl Data {
    /// This rank's micro-batches from after step `done` on.
    ///
    /// # Errors
    /// As [`MicroBatchStream::start_skipping`].
    pub fn open_stream(&self, config: &RunConfig, damage: Option<Arc<Damage>>, done: u64) -> Result<MicroBatchStream> {
        let options = StreamOptions {
            prefetch_bytes: config.data.prefetch_bytes as usize,
            flip: config.data.flip,
            num_classes: Some(self.num_classes),
            threads: config.data.threads as usize,
            captions: caption_options(config),
            allocator: batch_memory(self.experiment.device),
        };
        let (sources, order, lanes) = (self.sources.clone(), self.order.clone(), self.experiment.mesh.lanes_of_rank());
        let steps = done..config.train.steps;
        Ok(MicroBatchStream::start_skipping(sources, order, lanes, steps, options, damage)?)
    }
}

/// What captions a config asks for.
fn caption_options(config: &RunConfig) -> Option<CaptionOptions> {
    let weights = config.data.caption_weights.clone();
    config.data.caption_tokens.map(|tokens| CaptionOptions { tokens, weights })
}

/// What the stream is to do about damage, given what the run has agreed on so far.
pub fn damage_policy(config: &RunConfig, decisions: &DecisionLog) -> Option<Arc<Damage>> {
    let budget_rows = skip_budget(config);
    let known: Vec<BrokenGroup> = decisions.broken().cloned().collect();
    let needed = budget_rows.is_some() || !known.is_empty();
    needed.then(|| Arc::new(Damage::new(config.seed, budget_rows, known)))
}

/// Most rows of broken row groups; `None`: there must be none.
pub fn skip_budget(config: &RunConfig) -> Option<u64> {
    config.data.skip_budget_rows.filter(|_| config.data.on_broken == OnBroken::Skip)
}
