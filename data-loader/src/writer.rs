//! Writes one parquet part file of posterior moments, whole or not at all.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeListArray, Float16Array, Float32Array, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use half::f16;
use half::slice::HalfFloatSliceExt;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};

use crate::footer::{NUM_CLASSES, SCALING_FACTOR, SHAPE, VAE_DIGEST};
use crate::form::shape_numel;
use crate::{Columns, DataError, Dtype};

/// Rows that are handed to the parquet writer at a time, and rows of a page: what a reader of a row range must fetch.
const PAGE_ROWS: usize = 256;
const PAGE_BYTES: usize = 4 << 20;

/// What a part file says and how it is laid out.
#[derive(Clone, Debug, PartialEq)]
pub struct WriterOptions {
    /// Shape of one latent: `[channels, height, width]`.
    pub latent_shape: Vec<usize>,
    /// What a reader must multiply latents by.
    pub scaling_factor: Option<f64>,
    /// Labels lie in `0..num_classes`.
    pub num_classes: Option<usize>,
    /// Digest of the VAE.
    pub vae_digest: Option<String>,
    /// `F16` or `F32`.
    pub dtype: Dtype,
    /// Whether each row also has the moments of the mirrored image.
    pub flipped: bool,
    /// Rows of a row group.
    pub row_group_rows: usize,
    /// Compress with zstd. Latents are mostly noise, so this saves little and costs reading speed.
    pub zstd: bool,
}

impl WriterOptions {
    /// f16, not mirrored, row groups of 4,096 rows, no compression.
    pub fn new(latent_shape: Vec<usize>) -> Self {
        Self {
            latent_shape,
            scaling_factor: None,
            num_classes: None,
            vae_digest: None,
            dtype: Dtype::F16,
            flipped: false,
            row_group_rows: 4096,
            zstd: false,
        }
    }
}

/// One sample; each slice holds one latent in C order.
#[derive(Clone, Copy, Debug)]
pub struct LatentRow<'a> {
    /// Mean of the posterior, unscaled.
    pub mean: &'a [f32],
    /// Logarithm of its variance.
    pub logvar: &'a [f32],
    /// Mean and log-variance of the mirrored image.
    pub flipped: Option<(&'a [f32], &'a [f32])>,
    /// The class.
    pub label: i64,
    /// The sample's name, unique in the data set.
    pub id: &'a str,
}

/// A finished part file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenPart {
    /// Where it is.
    pub path: PathBuf,
    /// Its rows.
    pub rows: u64,
    /// Its length.
    pub file_bytes: u64,
}

/// Writes a part file under a temporary name; [`LatentWriter::finish`] makes it durable and gives it its name. Dropping the
/// writer without that leaves nothing behind.
pub struct LatentWriter {
    path: PathBuf,
    temporary: PathBuf,
    writer: Option<ArrowWriter<File>>,
    schema: Arc<Schema>,
    options: WriterOptions,
    numel: usize,
    rows: u64,
    /// Rows that wait to be handed over: one buffer per latent column, in the order of the schema.
    latents: Vec<Vec<f32>>,
    labels: Vec<i64>,
    ids: Vec<String>,
}

impl LatentWriter {
    /// Starts a part file at `path`, whose folder must exist. A file that is there is replaced by [`LatentWriter::finish`].
    ///
    /// # Errors
    /// If the options make no sense or the file cannot be created.
    pub fn create(path: &Path, options: WriterOptions) -> Result<Self, DataError> {
        let refuse = |reason: String| DataError::Write { file: path.display().to_string(), reason };
        let numel = shape_numel(&options.latent_shape).ok_or_else(|| {
            refuse(format!("latent shape {:?}; expected positive lengths, at most 2^28 numbers", options.latent_shape))
        })?;
        if options.dtype == Dtype::Bf16 {
            return Err(refuse("parquet has no list of bf16; choose f16 or f32".into()));
        }
        if options.row_group_rows == 0 {
            return Err(refuse("row groups of 0 rows; expected at least 1".into()));
        }
        let name = path.file_name().ok_or_else(|| refuse("the path has no file name".into()))?;
        let temporary = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        let schema = schema(&options, numel);
        let file = File::create(&temporary).map_err(|error| refuse(format!("{}: {error}", temporary.display())))?;
        let writer = match ArrowWriter::try_new(file, schema.clone(), Some(properties(&options, &schema))) {
            Ok(writer) => writer,
            Err(error) => {
                let _ = std::fs::remove_file(&temporary);
                return Err(refuse(error.to_string()));
            }
        };
        let latent_columns = if options.flipped { 4 } else { 2 };
        Ok(Self {
            path: path.to_owned(),
            temporary,
            writer: Some(writer),
            schema,
            options,
            numel,
            rows: 0,
            latents: vec![Vec::new(); latent_columns],
            labels: Vec::new(),
            ids: Vec::new(),
        })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// If a slice has another length than the shape, a number is not finite or too large for f16, the label is no class,
    /// mirrored moments are given where none are stored (or the other way round), or the disk is full.
    pub fn push(&mut self, row: LatentRow<'_>) -> Result<(), DataError> {
        let refuse = |reason: String| DataError::Write {
            file: self.path.display().to_string(),
            reason: format!("row `{}`: {reason}", row.id),
        };
        if row.flipped.is_some() != self.options.flipped {
            let (found, file) =
                if self.options.flipped { ("no moments", "stores them") } else { ("moments", "does not store them") };
            return Err(refuse(format!("has {found} of the mirrored image, but the file {file}")));
        }
        if self.options.num_classes.is_some_and(|classes| !(0..classes as i64).contains(&row.label)) {
            return Err(refuse(format!(
                "label {} is no class in 0..{}",
                row.label,
                self.options.num_classes.unwrap_or(0)
            )));
        }
        let latents =
            [row.mean, row.logvar].into_iter().chain(row.flipped.into_iter().flat_map(|(mean, logvar)| [mean, logvar]));
        for (latent, field) in latents.clone().zip(self.schema.fields()) {
            if latent.len() != self.numel {
                return Err(refuse(format!(
                    "`{}` has {} numbers; shape {:?} takes {}",
                    field.name(),
                    latent.len(),
                    self.options.latent_shape,
                    self.numel
                )));
            }
            let storable = |number: &f32| {
                number.is_finite() && (self.options.dtype == Dtype::F32 || f16::from_f32(*number).is_finite())
            };
            if let Some(at) = latent.iter().position(|number| !storable(number)) {
                return Err(refuse(format!(
                    "`{}` holds {} at position {at}, which {} cannot hold",
                    field.name(),
                    latent[at],
                    self.options.dtype
                )));
            }
        }
        for (buffer, latent) in self.latents.iter_mut().zip(latents) {
            buffer.extend_from_slice(latent);
        }
        self.labels.push(row.label);
        self.ids.push(row.id.to_owned());
        self.rows += 1;
        if self.labels.len() == PAGE_ROWS { self.hand_over() } else { Ok(()) }
    }

    /// Makes the file durable under its name.
    ///
    /// # Errors
    /// If it cannot be written; nothing is left under the name then but what was there before.
    pub fn finish(mut self) -> Result<WrittenPart, DataError> {
        self.hand_over()?;
        let refuse = |reason: String| DataError::Write { file: self.path.display().to_string(), reason };
        let Some(writer) = self.writer.take() else { unreachable!("the writer is taken only here") };
        let file = writer.into_inner().map_err(|error| refuse(error.to_string()))?;
        let durable = || -> std::io::Result<u64> {
            file.sync_all()?;
            std::fs::rename(&self.temporary, &self.path)?;
            // The new name is durable once its folder is.
            let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(folder)?.sync_all()?;
            Ok(file.metadata()?.len())
        };
        let file_bytes = durable().map_err(|error| refuse(error.to_string()))?;
        Ok(WrittenPart { path: self.path.clone(), rows: self.rows, file_bytes })
    }

    fn hand_over(&mut self) -> Result<(), DataError> {
        if self.labels.is_empty() {
            return Ok(());
        }
        let mut arrays: Vec<ArrayRef> = Vec::with_capacity(self.schema.fields().len());
        for numbers in &mut self.latents {
            let numbers = std::mem::take(numbers);
            let items: ArrayRef = match self.options.dtype {
                Dtype::F16 => {
                    let mut halves = vec![f16::ZERO; numbers.len()];
                    halves.convert_from_f32_slice(&numbers);
                    Arc::new(Float16Array::from(halves))
                }
                _ => Arc::new(Float32Array::from(numbers)),
            };
            // `create` has bounded the latent at 2^28 numbers.
            arrays.push(Arc::new(FixedSizeListArray::new(item(self.options.dtype), self.numel as i32, items, None)));
        }
        arrays.push(Arc::new(Int64Array::from(std::mem::take(&mut self.labels))));
        arrays.push(Arc::new(StringArray::from(std::mem::take(&mut self.ids))));
        let written =
            RecordBatch::try_new(self.schema.clone(), arrays).map_err(|error| error.to_string()).and_then(|batch| {
                match &mut self.writer {
                    Some(writer) => writer.write(&batch).map_err(|error| error.to_string()),
                    None => unreachable!("the writer is taken only in finish"),
                }
            });
        written.map_err(|reason| DataError::Write { file: self.path.display().to_string(), reason })
    }
}

impl Drop for LatentWriter {
    fn drop(&mut self) {
        // After a successful `finish` the temporary name is gone already.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

fn item(dtype: Dtype) -> Arc<Field> {
    Arc::new(Field::new("element", if dtype == Dtype::F16 { DataType::Float16 } else { DataType::Float32 }, false))
}

fn schema(options: &WriterOptions, numel: usize) -> Arc<Schema> {
    let columns = Columns::default();
    let mut names = vec![columns.latent_mean.clone(), columns.latent_logvar.clone()];
    if options.flipped {
        names.extend([columns.flipped_mean(), columns.flipped_logvar()]);
    }
    let latent = |name: String| Field::new(name, DataType::FixedSizeList(item(options.dtype), numel as i32), false);
    let mut fields: Vec<Field> = names.into_iter().map(latent).collect();
    fields.push(Field::new(columns.label, DataType::Int64, false));
    fields.push(Field::new(columns.id, DataType::Utf8, false));
    // Arrow readers look for keys in the embedded schema, others in the footer (`properties`).
    Arc::new(Schema::new_with_metadata(fields, keys(options).into_iter().collect::<HashMap<_, _>>()))
}

fn keys(options: &WriterOptions) -> Vec<(String, String)> {
    let optional = [
        (SCALING_FACTOR, options.scaling_factor.map(|factor| factor.to_string())),
        (NUM_CLASSES, options.num_classes.map(|classes| classes.to_string())),
        (VAE_DIGEST, options.vae_digest.clone()),
    ];
    let shape = format!("{:?}", options.latent_shape).replace(' ', "");
    let given = optional.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
    std::iter::once((SHAPE.to_owned(), shape)).chain(given).collect()
}

fn properties(options: &WriterOptions, schema: &Schema) -> WriterProperties {
    let keys = keys(options).into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
    let mut properties = WriterProperties::builder()
        .set_key_value_metadata(Some(keys))
        .set_max_row_group_row_count(Some(options.row_group_rows))
        .set_data_page_row_count_limit(PAGE_ROWS)
        .set_data_page_size_limit(PAGE_BYTES)
        .set_compression(if options.zstd {
            Compression::ZSTD(ZstdLevel::default())
        } else {
            Compression::UNCOMPRESSED
        });
    for field in schema.fields() {
        if let DataType::FixedSizeList(element, _) = field.data_type() {
            // Latents do not repeat, and nobody asks for their minimum.
            let column = vec![field.name().clone(), "list".into(), element.name().clone()];
            properties = properties
                .set_column_dictionary_enabled(column.clone().into(), false)
                .set_column_statistics_enabled(column.into(), EnabledStatistics::None);
        }
    }
    properties.build()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::{sample, samples, write};
    use crate::{LatentDataset, RowRun};

    #[test]
    fn what_is_written_is_read_back_in_every_layout() {
        for (dtype, flipped, zstd, row_group_rows) in [
            (Dtype::F16, false, false, 4096),
            (Dtype::F16, true, true, 100),
            (Dtype::F32, true, false, 256),
            (Dtype::F32, false, true, 7),
        ] {
            let options = WriterOptions {
                dtype,
                flipped,
                zstd,
                row_group_rows,
                scaling_factor: Some(0.18215),
                num_classes: Some(10),
                vae_digest: Some("sha256:ab".into()),
                ..WriterOptions::new(vec![2, 3, 4])
            };
            let folder = tempfile::tempdir().unwrap();
            let samples = samples(600, &options);
            write(&folder.path().join("a.parquet"), options, &samples);
            let dataset = LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap();
            let meta = dataset.meta();
            assert_eq!((meta.rows, meta.moments, meta.flipped, meta.dtype), (600, true, flipped, dtype));
            assert_eq!(
                (&meta.latent_shape[..], meta.scaling_factor, meta.num_classes),
                (&[2, 3, 4][..], Some(0.18215), Some(10))
            );
            assert_eq!(meta.vae_digest.as_deref(), Some("sha256:ab"));
            assert_eq!(meta.row_groups, 600usize.div_ceil(row_group_rows));
            let block = dataset.read(&[RowRun { first_row: 0, rows: 600 }]).unwrap();
            let mut latent = vec![0.0; 24];
            for (i, sample) in samples.iter().enumerate() {
                assert_eq!(block.labels()[i], sample.label);
                for (column, expected) in sample.latents.iter().enumerate() {
                    block.latent(column, i, &mut latent);
                    assert_eq!(&latent, expected, "row {i} column {column} {dtype}");
                }
            }
        }
    }

    #[test]
    fn an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions::new(vec![2, 2, 2]);
        let mut writer = LatentWriter::create(&folder.path().join("a.parquet"), options.clone()).unwrap();
        writer.push(sample(0, &options).row()).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(writer);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn bad_rows_are_refused_by_name_and_the_good_ones_stay() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let options = WriterOptions { num_classes: Some(10), ..WriterOptions::new(vec![2, 2, 2]) };
        let mut writer = LatentWriter::create(&path, options.clone()).unwrap();
        let good = sample(0, &options);
        writer.push(good.row()).unwrap();
        let too_large = [70000.0f32; 8];
        for (row, words) in [
            (LatentRow { mean: &good.latents[0][..7], ..good.row() }, "7 numbers"),
            (LatentRow { logvar: &[f32::NAN; 8], ..good.row() }, "NaN"),
            (LatentRow { mean: &too_large, ..good.row() }, "f16 cannot hold"),
            (LatentRow { label: 10, ..good.row() }, "0..10"),
            (LatentRow { flipped: Some((&too_large, &too_large)), ..good.row() }, "mirrored"),
        ] {
            let error = writer.push(row).unwrap_err().to_string();
            assert!(error.contains(words) && error.contains("id-0") && error.contains("a.parquet"), "{error}");
        }
        assert_eq!(writer.finish().unwrap().rows, 1);
        assert_eq!(LatentDataset::open(path.to_str().unwrap(), &Columns::default()).unwrap().meta().rows, 1);
    }
}
