//! Where samples go: a file format that is written part by part.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::fast_dit::FastDitSink;
use super::lightningdit::LightningDitSink;
use super::{mds, webdataset};
use crate::writer::Row;
use crate::{Caption, DataError, Dtype, LatentWriter, WriterOptions};

/// How parquet files are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParquetLayout {
    /// Rows of a row group.
    pub row_group_rows: usize,
    /// Compress with zstd.
    pub zstd: bool,
}

/// The formats that can be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    /// Parquet files `part-00000-of-00008.parquet`.
    Parquet(ParquetLayout),
    /// fast-DiT's folders of one `.npy` per sample.
    FastDit,
    /// LightningDiT's safetensors shards.
    LightningDit,
    /// WebDataset's tar shards.
    WebDataset,
    /// MosaicML Streaming's shards.
    Mds,
}

impl ExportFormat {
    /// Whether latents of any number type can be written; bf16 is not known to numpy.
    pub(super) fn writes(self, dtype: Dtype) -> bool {
        dtype != Dtype::Bf16 || matches!(self, Self::Parquet(_) | Self::LightningDit)
    }

    /// Whether parts can go to an object store one by one.
    pub(super) fn uploads(self) -> bool {
        matches!(self, Self::Parquet(_))
    }

    /// Whether rows with shapes of their own can be written.
    pub(super) fn writes_row_shapes(self) -> bool {
        matches!(self, Self::Parquet(_) | Self::WebDataset | Self::Mds)
    }

    /// The writer of a data set that is described by `options`.
    ///
    /// # Errors
    /// With the words for a message, if the format has no way to say it.
    pub(super) fn sink(self, options: &WriterOptions) -> Result<Box<dyn Sink>, String> {
        if options.captions.is_some() && !matches!(self, Self::Parquet(_)) {
            return Err("has captions, which only parquet has a place for; take --drop-captions".into());
        }
        let plain = matches!(self, Self::FastDit | Self::LightningDit);
        if plain && options.moments {
            return Err("stores posterior moments, which this format has no place for; take --posterior mean".into());
        }
        Ok(match self {
            Self::Parquet(layout) => Box::new(ParquetSink {
                options: WriterOptions { row_group_rows: layout.row_group_rows, zstd: layout.zstd, ..options.clone() },
            }),
            Self::FastDit if options.flipped => {
                return Err("stores mirrored latents, for which fast-DiT has no place; take --drop-flipped".into());
            }
            Self::FastDit if !options.labels => {
                return Err(
                    "has no labels, which fast-DiT needs; import it with --labels FILE or --label N first".into()
                );
            }
            Self::FastDit => Box::new(FastDitSink),
            Self::LightningDit => Box::new(LightningDitSink { flipped: options.flipped, labels: options.labels }),
            Self::WebDataset => {
                Box::new(webdataset::WebDatasetSink { moments: options.moments, flipped: options.flipped })
            }
            Self::Mds => Box::new(mds::MdsSink::new(options)),
        })
    }
}

/// A row that is written.
#[derive(Clone, Copy)]
pub(super) struct SinkRow<'a> {
    pub latents: &'a [&'a [f32]],
    pub shape: &'a [usize],
    pub dtype: Dtype,
    pub captions: &'a [Caption<'a>],
    pub label: Option<i64>,
    pub id: &'a str,
}

/// A format's writer. Parts may be written at the same time.
pub(super) trait Sink: Sync {
    /// Prepares the folder; there will be `parts` parts.
    fn begin(&self, _folder: &Path, _parts: usize) -> Result<(), DataError> {
        Ok(())
    }

    /// Starts part `part` of `parts` in `folder`; its first row is the `first_row`-th of the whole.
    fn part(&self, folder: &Path, part: usize, parts: usize, first_row: usize) -> Result<Box<dyn Part>, DataError>;

    /// Called when all parts are finished.
    fn end(&self, _folder: &Path, _parts: usize) -> Result<(), DataError> {
        Ok(())
    }
}

/// A part that is being written.
pub(super) trait Part {
    /// Appends a row.
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError>;

    /// Makes the part durable.
    fn finish(self: Box<Self>) -> Result<(), DataError>;
}

struct ParquetSink {
    options: WriterOptions,
}

/// The name of a part.
pub(super) fn parquet_name(part: usize, parts: usize) -> String {
    format!("part-{part:05}-of-{parts:05}.parquet")
}

impl Sink for ParquetSink {
    fn part(&self, folder: &Path, part: usize, parts: usize, _: usize) -> Result<Box<dyn Part>, DataError> {
        let path = folder.join(parquet_name(part, parts));
        Ok(Box::new(ParquetPart(LatentWriter::create(&path, self.options.clone())?, self.options.row_shapes)))
    }
}

struct ParquetPart(LatentWriter, bool);

impl Part for ParquetPart {
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError> {
        let shape = self.1.then_some(row.shape);
        self.0.push_row(Row { latents: row.latents, shape, captions: row.captions, label: row.label, id: row.id })
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        self.0.finish().map(|_| ())
    }
}

/// Writes a small file. It is not synced: there may be millions.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<(), DataError> {
    std::fs::write(path, bytes)
        .map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })
}

/// Flushes and syncs.
pub(super) fn durable(mut file: BufWriter<File>) -> std::io::Result<()> {
    file.flush()?;
    file.get_ref().sync_all()
}
