//! What a run reads: its data sets, and this rank's micro-batches of them.

use super::cache::open_options;
use super::stepper::Experiment;
use crate::ffi::batch_memory;
use crate::recipe::Recipe;
use anyhow::{Context, Result};
use configs::RunConfig;
use data_loader::{
    LatentDataset, MicroBatchStream, MixedSource, OpenOptions, RowOrder, ScheduleOptions, StreamOptions, StreamSource,
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

/// Says where the sources of a mix may be latents of different VAEs.
pub fn warnings(sources: &[StreamSource]) -> Vec<String> {
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
    others.map(tell).collect()
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

/// This rank's micro-batches from after step `done` on.
///
/// # Errors
/// As [`MicroBatchStream::start`].
pub fn open_stream(
    config: &RunConfig,
    recipe: &Recipe,
    sources: Vec<StreamSource>,
    order: &RowOrder,
    experiment: &Experiment,
    done: u64,
) -> Result<MicroBatchStream> {
    let options = StreamOptions {
        prefetch_bytes: config.data.prefetch_bytes as usize,
        flip: config.data.flip,
        num_classes: Some(recipe.model.num_classes as usize),
        allocator: batch_memory(experiment.device),
    };
    let lanes = experiment.block.range();
    Ok(MicroBatchStream::start(sources, order.clone(), lanes, done, config.train.steps, options)?)
}
