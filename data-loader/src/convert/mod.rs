//! From other formats of latents to parquet, and back.
//!
//! A [`Source`] gives samples by number, a `Sink` takes them part by part; [`convert`] reads the one on several threads into
//! the other. What is not finished is never taken for a data set: see `destination`.

mod array;
mod dataset;
mod destination;
mod fast_dit;
mod files;
mod labels;
mod lightningdit;
mod mds;
mod npy;
mod order;
mod pipeline;
mod roles;
mod safetensors;
mod sink;
mod spool;
mod stats;
#[cfg(test)]
mod tests;
mod values;
mod webdataset;

use std::ops::Range;

pub use labels::LabelMap;
pub use order::Order;
pub use pipeline::{ConvertOptions, Converted, FileSize, Progress, convert};
pub use sink::{ExportFormat, ParquetLayout};
pub use values::Values;

use crate::{Caption, CaptionMeta, Columns, DataError, Dtype};
use array::Array;
use files::Place;

/// The formats that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFormat {
    /// fast-DiT's folders of one `.npy` per sample: `…_features/0.npy`, `…_labels/0.npy`.
    FastDit,
    /// LightningDiT's safetensors shards: `latents`, `latents_flip`, `labels`.
    LightningDit,
    /// WebDataset's tar shards with `.npy` members.
    WebDataset,
    /// MosaicML Streaming's shards with their `index.json`.
    Mds,
    /// Parquet as the trainer reads it.
    Parquet,
}

/// What a source's columns, tensors or members are called, where not by one of the usual names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    /// Latents.
    pub latent: Option<String>,
    /// Mean and log-variance one behind the other along the channels.
    pub moments: Option<String>,
    /// Posterior means.
    pub latent_mean: Option<String>,
    /// Posterior log-variances.
    pub latent_logvar: Option<String>,
    /// Latents of the mirrored images.
    pub latent_flipped: Option<String>,
    /// Classes.
    pub label: Option<String>,
    /// Names of the samples.
    pub id: Option<String>,
    /// Shapes of the rows, in parquet.
    pub shape: Option<String>,
    /// Caption embeddings, in parquet.
    pub caption: Option<String>,
    /// Their masks.
    pub caption_mask: Option<String>,
}

impl Names {
    /// The parquet columns of these names, with the usual ones for the rest.
    pub fn columns(&self) -> Columns {
        let mut columns = Columns::default();
        for (name, column) in [
            (&self.latent, &mut columns.latent),
            (&self.latent_mean, &mut columns.latent_mean),
            (&self.latent_logvar, &mut columns.latent_logvar),
            (&self.latent_flipped, &mut columns.latent_flipped),
            (&self.label, &mut columns.label),
            (&self.id, &mut columns.id),
            (&self.shape, &mut columns.shape),
            (&self.caption, &mut columns.caption),
            (&self.caption_mask, &mut columns.caption_mask),
        ] {
            if let Some(name) = name {
                column.clone_from(name);
            }
        }
        columns
    }
}

/// What a source cannot tell itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SourceOptions {
    /// What columns, tensors or members are called.
    pub names: Names,
    /// The shape of latents that are stored as bare bytes.
    pub shape: Option<Vec<usize>>,
    /// Their number type.
    pub bytes_dtype: Option<Dtype>,
    /// Leave out captions.
    pub drop_captions: bool,
    /// LightningDiT's file of channel statistics, where it is not beside the shards.
    pub stats: Option<String>,
}

/// What a source holds.
#[derive(Clone, Debug, PartialEq)]
pub struct About {
    /// Path or URL without secrets.
    pub name: String,
    /// The format.
    pub format: SourceFormat,
    /// The shape of the first sample's latent.
    pub latent_shape: Vec<usize>,
    /// Whether it says that samples have shapes of their own.
    pub row_shapes: bool,
    /// Whether posterior moments are stored.
    pub moments: bool,
    /// Whether the mirrored images' latents are stored too.
    pub flipped: bool,
    /// The captions, where samples have them.
    pub captions: Option<CaptionMeta>,
    /// Whether samples have classes.
    pub labels: bool,
    /// The number type of the first sample.
    pub dtype: Dtype,
    /// What the numbers must be multiplied by before a model sees them, where it is known.
    pub scaling_factor: Option<f64>,
    /// Where it is known.
    pub num_classes: Option<usize>,
    /// Where it is known.
    pub vae_digest: Option<String>,
    /// Mean and standard deviation of each channel, where they are stored.
    pub channel_stats: Option<(Vec<f64>, Vec<f64>)>,
    /// Whether reading is fast only in the order of the rows.
    pub sequential: bool,
}

/// A sample without its label.
#[derive(Clone, Debug)]
pub struct Sample {
    /// The latent, or mean and log-variance; then the same of the mirrored image.
    latents: Vec<Array>,
    captions: Vec<CaptionArray>,
    /// Its name.
    id: String,
}

/// A caption of a sample.
#[derive(Clone, Debug)]
struct CaptionArray {
    /// `[tokens, dim]`
    embeddings: Vec<f32>,
    /// `[tokens]`, where masks are stored.
    mask: Option<Vec<bool>>,
}

impl CaptionArray {
    fn as_written(&self) -> Caption<'_> {
        Caption { embeddings: &self.embeddings, mask: self.mask.as_deref() }
    }
}

/// Samples in another format.
pub trait Source: Send + Sync {
    /// What is in it.
    fn about(&self) -> &About;

    /// Number of samples.
    fn rows(&self) -> usize;

    /// File and entry of a sample, for messages.
    fn place(&self, row: usize) -> String;

    /// The classes of samples that follow one another; asked only where [`About::labels`] says that there are any.
    ///
    /// # Errors
    /// If one is missing or no integer.
    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError>;

    /// The names of samples that follow one another.
    ///
    /// # Errors
    /// If one is missing.
    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError>;

    /// Samples in the order of `rows`.
    ///
    /// # Errors
    /// If one cannot be read.
    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError>;
}

/// Opens the samples at a path or URL, in the given format or in the one that is found there.
///
/// # Errors
/// If there is none, or it is not as it should be.
pub fn open(url: &str, format: Option<SourceFormat>, options: &SourceOptions) -> Result<Box<dyn Source>, DataError> {
    let place = Place::parse(url)?;
    match format.map_or_else(|| detect(&place), Ok)? {
        SourceFormat::Parquet => Ok(Box::new(dataset::ParquetSource::open(url, options)?)),
        other => open_at(&place, other, options),
    }
}

/// The samples at a place, of any format but parquet.
fn open_at(place: &Place, format: SourceFormat, options: &SourceOptions) -> Result<Box<dyn Source>, DataError> {
    Ok(match format {
        SourceFormat::FastDit => Box::new(fast_dit::FastDit::open(place)?),
        SourceFormat::LightningDit => Box::new(lightningdit::LightningDit::open(place, options)?),
        SourceFormat::WebDataset => Box::new(webdataset::WebDataset::open(place, options)?),
        SourceFormat::Mds => Box::new(mds::Mds::open(place, options)?),
        SourceFormat::Parquet => Box::new(dataset::ParquetSource::open(&place.name(), options)?),
    })
}

/// The format of what is at a place.
fn detect(place: &Place) -> Result<SourceFormat, DataError> {
    let of_file = |name: &str| match name {
        name if name.ends_with(".parquet") => Some(SourceFormat::Parquet),
        name if name.ends_with(".tar") => Some(SourceFormat::WebDataset),
        name if name.ends_with(".safetensors") => Some(SourceFormat::LightningDit),
        "index.json" => Some(SourceFormat::Mds),
        _ => None,
    };
    if let Some(format) = of_file(&place.file_name()) {
        return Ok(format);
    }
    let listing = place.list()?;
    let mut found: Vec<SourceFormat> = Vec::new();
    let is_fast_dit = |name: &str| name.ends_with(fast_dit::FEATURES) || name.ends_with(fast_dit::LABELS);
    let of_folder = (listing.folders.iter().any(|name| is_fast_dit(name)) || is_fast_dit(&place.file_name()))
        .then_some(SourceFormat::FastDit);
    for format in listing.files.iter().filter_map(|name| of_file(name)).chain(of_folder) {
        if !found.contains(&format) {
            found.push(format);
        }
    }
    match found[..] {
        [format] => Ok(format),
        // Parquet files may lie in folders of their own (`label=3/…`).
        [] if !listing.folders.is_empty() => Ok(SourceFormat::Parquet),
        _ => {
            let found: Vec<_> = found.iter().map(|format| format!("{format:?}")).collect();
            let found = if found.is_empty() { "nothing that is known".to_owned() } else { found.join(" and ") };
            Err(DataError::source(
                place.name(),
                format!(
                    "holds {found}; expected one of: …{} and …{} (fast-DiT), *.safetensors (LightningDiT), *.tar \
                     (WebDataset), index.json (MDS), *.parquet; say which with --from",
                    fast_dit::FEATURES,
                    fast_dit::LABELS
                ),
            ))
        }
    }
}
