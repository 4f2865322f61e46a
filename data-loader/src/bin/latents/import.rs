//! `latents import`.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use data_loader::convert::{
    ConvertOptions, ExportFormat, LabelMap, ParquetLayout, SourceFormat, SourceOptions, Values, convert, open,
};

use crate::layout::{LayoutArgs, NameArgs, StoredDtype, Told, positive};

#[derive(Args)]
pub struct ImportArgs {
    /// The source: a folder, a file or a URL (file://, s3://, gs://, az://). WebDataset shards also as
    /// `train-{000000..000123}.tar`.
    source: String,
    /// Folder or URL (s3://, gs://, az://) of the data set. It must not exist yet, or be empty.
    dest: String,
    /// Format of the source.
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    from: Format,
    #[command(flatten)]
    names: NameArgs,
    /// What the source's numbers must be multiplied by before a model sees them [default: what the source tells; 1 for
    /// fast-DiT, whose numbers are multiplied already].
    #[arg(long, value_name = "F", value_parser = factor)]
    scaling_factor: Option<f64>,
    /// Divide the numbers, to take out a scaling factor that is already in them. What the model sees stays the same: the
    /// stored scaling factor is multiplied by this, unless --scaling-factor is given.
    #[arg(long, value_name = "F", value_parser = factor)]
    divide_by: Option<f64>,
    /// Subtract the mean and divide by the standard deviation of each channel, as LightningDiT does when it trains.
    #[arg(long)]
    normalize: bool,
    /// Statistics for --normalize: LightningDiT's latents_stats.pt, or JSON {"mean": […], "std": […]} [default:
    /// latents_stats.pt beside the shards].
    #[arg(long, value_name = "FILE")]
    stats: Option<String>,
    /// Number of classes [default: what the source tells, else the largest label + 1].
    #[arg(long, value_name = "N", value_parser = positive)]
    num_classes: Option<usize>,
    /// Labels by the samples' ids: a JSON object, or lines `id,class`. They go before the source's own.
    #[arg(long, value_name = "FILE", conflicts_with = "label")]
    labels: Option<String>,
    /// One label for all samples.
    #[arg(long, value_name = "N")]
    label: Option<i64>,
    /// Write no labels, for models without classes.
    #[arg(long, conflicts_with_all = ["labels", "label", "num_classes"])]
    unlabelled: bool,
    /// SHA-256 of the VAE's weight file.
    #[arg(long, value_name = "DIGEST")]
    vae_digest: Option<String>,
    /// Samples may have different shapes; each row stores its own.
    #[arg(long)]
    row_shapes: bool,
    /// Shape of latents that MDS stores as bare bytes, as `4,32,32`.
    #[arg(long, value_name = "DIMS", value_delimiter = ',', value_parser = positive)]
    shape: Option<Vec<usize>>,
    /// Their number type.
    #[arg(long, value_enum)]
    bytes_dtype: Option<StoredDtype>,
    /// Leave out the captions of parquet.
    #[arg(long)]
    drop_captions: bool,
    #[command(flatten)]
    layout: LayoutArgs,
}

/// Formats that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Whatever is found there.
    Auto,
    /// Folders `…_features` and `…_labels` of one .npy per sample.
    FastDit,
    /// Safetensors shards with `latents`, `latents_flip`, `labels`.
    #[value(name = "lightningdit")]
    LightningDit,
    /// Tar shards with .npy members.
    #[value(name = "webdataset")]
    WebDataset,
    /// MosaicML Streaming's shards and their index.json.
    Mds,
    /// Parquet files that the trainer reads.
    Parquet,
}

impl Format {
    fn format(self) -> Option<SourceFormat> {
        Some(match self {
            Self::Auto => return None,
            Self::FastDit => SourceFormat::FastDit,
            Self::LightningDit => SourceFormat::LightningDit,
            Self::WebDataset => SourceFormat::WebDataset,
            Self::Mds => SourceFormat::Mds,
            Self::Parquet => SourceFormat::Parquet,
        })
    }
}

pub fn run(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let told = Told::new();
    let source_options = SourceOptions {
        names: args.names.names()?,
        shape: args.shape.clone(),
        bytes_dtype: args.bytes_dtype.map(Into::into),
        drop_captions: args.drop_captions,
        stats: args.stats.clone(),
    };
    let source = open(&args.source, args.from.format(), &source_options)?;
    let about = source.about();
    let stats = about.channel_stats.clone();
    ensure!(args.stats.is_none() || stats.is_some(), "--stats: only LightningDiT's shards are normalised");
    let normalize = match args.normalize {
        true => Some(stats.with_context(|| {
            format!("--normalize: {} has no latents_stats.pt; name the file with --stats", about.name)
        })?),
        false => None,
    };
    if normalize.is_none() && about.channel_stats.is_some() {
        eprintln!(
            "{}: stored as they are; LightningDiT trains on (x - mean) / std: take --normalize for the same",
            about.name
        );
    }
    let layout = &args.layout;
    let options = ConvertOptions {
        format: ExportFormat::Parquet(ParquetLayout { row_group_rows: layout.row_group_rows, zstd: layout.zstd }),
        dtype: layout.dtype.map(Into::into),
        order: layout.order(),
        file_size: layout.file_size(),
        threads: layout.threads(),
        values: Values { normalize, divide_by: args.divide_by },
        scaling_factor: args.scaling_factor,
        num_classes: args.num_classes,
        labels: args.labels.as_deref().map(LabelMap::read).transpose()?,
        label: args.label,
        unlabelled: args.unlabelled,
        vae_digest: args.vae_digest.clone(),
        row_shapes: args.row_shapes,
        mean_only: false,
        drop_flipped: false,
    };
    let converted = convert(source.as_ref(), &args.dest, &options, &|progress| told.report(progress))?;
    told.done(&converted, &configs::location::redact(&args.dest));
    Ok(ExitCode::SUCCESS)
}

fn factor(text: &str) -> Result<f64, String> {
    let factor = text.parse().ok().filter(|factor: &f64| factor.is_finite() && *factor > 0.0);
    factor.ok_or_else(|| "expected a positive number".into())
}
