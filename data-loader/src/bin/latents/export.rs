//! `latents export`.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use data_loader::Dtype;
use data_loader::convert::{
    ConvertOptions, ExportFormat, ParquetLayout, SourceFormat, SourceOptions, Values, convert, open,
};

use crate::layout::{LayoutArgs, NameArgs, Told};

#[derive(Args)]
pub struct ExportArgs {
    /// The data set: a .parquet file, a folder, or a URL (file://, s3://, gs://, az://, https://).
    url: String,
    /// Folder to write; it must not exist yet, or be empty. Parquet can be written to a URL (s3://, gs://, az://) too.
    dest: String,
    /// Format to write.
    #[arg(long, value_enum, default_value_t = To::Parquet)]
    to: To,
    #[command(flatten)]
    names: NameArgs,
    /// Of posterior moments: write both, or the mean as the latent.
    #[arg(long, value_enum, default_value_t = Posterior::Moments)]
    posterior: Posterior,
    /// Leave out the mirrored latents.
    #[arg(long)]
    drop_flipped: bool,
    /// Leave out captions, which only parquet has a place for.
    #[arg(long)]
    drop_captions: bool,
    /// Multiply the numbers by the data set's scaling factor, as fast-DiT stores them.
    #[arg(long)]
    scaled: bool,
    #[command(flatten)]
    layout: LayoutArgs,
}

/// Formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum To {
    /// Plain parquet: latents, label, id.
    Parquet,
    /// fast-DiT's folders of one .npy per sample (f32 unless --dtype is given).
    Npy,
    /// LightningDiT's shards (f32 unless --dtype is given).
    Safetensors,
    /// Tar shards.
    #[value(name = "webdataset")]
    WebDataset,
    /// MosaicML Streaming's shards.
    Mds,
}

/// What to write of posterior moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Posterior {
    /// Mean and log-variance.
    Moments,
    /// The mean alone.
    Mean,
}

pub fn run(args: &ExportArgs) -> anyhow::Result<ExitCode> {
    let told = Told::new();
    let source_options =
        SourceOptions { names: args.names.names()?, drop_captions: args.drop_captions, ..SourceOptions::default() };
    let source = open(&args.url, Some(SourceFormat::Parquet), &source_options)?;
    let layout = &args.layout;
    let (format, usual_dtype) = match args.to {
        To::Parquet => {
            let layout = ParquetLayout { row_group_rows: layout.row_group_rows, zstd: layout.zstd };
            (ExportFormat::Parquet(layout), None)
        }
        To::Npy => (ExportFormat::FastDit, Some(Dtype::F32)),
        To::Safetensors => (ExportFormat::LightningDit, Some(Dtype::F32)),
        To::WebDataset => (ExportFormat::WebDataset, None),
        To::Mds => (ExportFormat::Mds, None),
    };
    let factor = source.about().scaling_factor.filter(|_| args.scaled);
    anyhow::ensure!(
        !args.scaled || factor.is_some(),
        "--scaled: {} has no `ditharos.scaling_factor`",
        source.about().name
    );
    let options = ConvertOptions {
        format,
        dtype: layout.dtype.map(Into::into).or(usual_dtype),
        order: layout.order(),
        file_size: layout.file_size(),
        threads: layout.threads(),
        values: Values { normalize: None, divide_by: factor.map(f64::recip) },
        scaling_factor: factor.map(|_| 1.0),
        num_classes: None,
        labels: None,
        label: None,
        unlabelled: !source.about().labels,
        vae_digest: None,
        row_shapes: false,
        mean_only: args.posterior == Posterior::Mean,
        drop_flipped: args.drop_flipped,
    };
    let converted = convert(source.as_ref(), &args.dest, &options, &|progress| told.report(progress))?;
    told.done(&converted, &configs::location::redact(&args.dest));
    if !args.scaled && args.to != To::Parquet && converted.scaling_factor.is_some_and(|factor| factor != 1.0) {
        eprintln!(
            "the numbers are written as they are stored, not multiplied by the scaling factor; --scaled does that"
        );
    }
    Ok(ExitCode::SUCCESS)
}
