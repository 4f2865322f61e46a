//! Writes one parquet part file of latents, whole or not at all.

mod captions;
mod layout;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BinaryArray, FixedSizeBinaryArray, FixedSizeListArray, Int32Array, Int64Array, ListArray, RecordBatch,
    StringArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::Schema;
use parquet::arrow::ArrowWriter;

pub use captions::Caption;
pub use layout::WriterOptions;

use captions::WaitingCaptions;

use crate::DataError;
use crate::block::Numbers;
use crate::form::shape_numel;

/// Rows of a page, what a reader of a row range must fetch; so many are handed to the parquet writer at a time.
const PAGE_ROWS: usize = 256;
/// Fewer rows are handed over where their numbers take more bytes than this.
const HANDED_BYTES: usize = 32 << 20;

/// A sample with the moments of its posterior; each slice holds one latent in C order.
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

/// A sample of any kind that [`WriterOptions`] can describe.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// One slice per latent column, in the order of [`WriterOptions::latent_columns`]; each holds one latent in C order.
    pub latents: &'a [&'a [f32]],
    /// The shape of this row's latents, where rows have shapes of their own.
    pub shape: Option<&'a [usize]>,
    /// The captions, where captions are stored.
    pub captions: &'a [Caption<'a>],
    /// The class, where classes are stored.
    pub label: Option<i64>,
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
///
/// Memory: the row group that is being written, encoded, and up to 256 rows or 32 MiB that wait to be.
pub struct LatentWriter {
    path: PathBuf,
    temporary: PathBuf,
    writer: Option<ArrowWriter<File>>,
    schema: Arc<Schema>,
    options: WriterOptions,
    columns: Vec<String>,
    rows: u64,
    waiting: Waiting,
}

/// Rows that wait to be handed over.
#[derive(Default)]
struct Waiting {
    rows: usize,
    /// One buffer per latent column.
    latents: Vec<Numbers>,
    /// Numbers of one latent, row by row; with shapes of their own only.
    numels: Vec<usize>,
    /// The same rows' shapes.
    shapes: Vec<Vec<i32>>,
    captions: Option<WaitingCaptions>,
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
        options.check().map_err(refuse)?;
        let name = path.file_name().ok_or_else(|| refuse("the path has no file name".into()))?;
        let temporary = path.with_file_name(format!(".{}.{}.tmp", name.to_string_lossy(), std::process::id()));
        let schema = options.schema();
        let file = File::create(&temporary).map_err(|error| refuse(format!("{}: {error}", temporary.display())))?;
        let writer = match ArrowWriter::try_new(file, schema.clone(), Some(options.properties(&schema))) {
            Ok(writer) => writer,
            Err(error) => {
                let _ = std::fs::remove_file(&temporary);
                return Err(refuse(error.to_string()));
            }
        };
        let columns = options.latent_columns();
        let waiting = Waiting::new(&options);
        Ok(Self { path: path.to_owned(), temporary, writer: Some(writer), schema, options, columns, rows: 0, waiting })
    }

    /// Appends a row of posterior moments.
    ///
    /// # Errors
    /// As [`LatentWriter::push_row`].
    pub fn push(&mut self, row: LatentRow<'_>) -> Result<(), DataError> {
        let mut latents = vec![row.mean, row.logvar];
        latents.extend(row.flipped.into_iter().flat_map(|(mean, logvar)| [mean, logvar]));
        self.push_row(Row { latents: &latents, shape: None, captions: &[], label: Some(row.label), id: row.id })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// If the row has other columns than the file, a slice has another length than the shape, a number is not finite or
    /// more than the number type holds, the label is no class, a caption is not as the file says, or the disk is full. The row is
    /// left out then.
    pub fn push_row(&mut self, row: Row<'_>) -> Result<(), DataError> {
        self.take(row).map_err(|reason| DataError::Write {
            file: self.path.display().to_string(),
            reason: format!("row `{}`: {reason}", row.id),
        })?;
        self.rows += 1;
        if self.waiting.rows == PAGE_ROWS || self.waiting.bytes() >= HANDED_BYTES { self.hand_over() } else { Ok(()) }
    }

    fn take(&mut self, row: Row<'_>) -> Result<(), String> {
        if row.latents.len() != self.columns.len() {
            return Err(format!(
                "has {} latents, but the file has the columns {}; are moments or the mirrored image missing or too many?",
                row.latents.len(),
                self.columns.join(", ")
            ));
        }
        match (row.label, self.options.labels) {
            (None, true) => return Err("has no label, but the file has a column of them".into()),
            (Some(_), false) => return Err("has a label, but the file has no column for it".into()),
            _ => {}
        }
        if let (Some(label), Some(classes)) = (row.label, self.options.num_classes)
            && !(0..classes as i64).contains(&label)
        {
            return Err(format!("label {label} is no class in 0..{classes}"));
        }
        let shape = match (row.shape, self.options.row_shapes) {
            (Some(shape), true) => shape,
            (None, false) => &self.options.latent_shape,
            (Some(shape), false) if shape == self.options.latent_shape => shape,
            (Some(shape), false) => {
                return Err(format!("has shape {shape:?}; the file's is {:?}", self.options.latent_shape));
            }
            (None, true) => return Err("has no shape, but the file's rows have shapes of their own".into()),
        };
        let numel = shape_numel(shape).ok_or_else(|| format!("has shape {shape:?}; expected 1 to 2^28 numbers"))?;
        for (latent, name) in row.latents.iter().zip(&self.columns) {
            if latent.len() != numel {
                return Err(format!("`{name}` has {} numbers; shape {shape:?} takes {numel}", latent.len()));
            }
        }
        match &self.options.captions {
            Some(captions) => captions.check_row(row.captions)?,
            None if !row.captions.is_empty() => return Err("has captions, but the file has no column for them".into()),
            None => {}
        }
        self.waiting.push(&row, shape).map_err(|(column, at, number)| {
            format!(
                "`{}` holds {number} at position {at}, which {} cannot hold",
                self.columns[column], self.options.dtype
            )
        })
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
        if self.waiting.rows == 0 {
            return Ok(());
        }
        let waiting = std::mem::replace(&mut self.waiting, Waiting::new(&self.options));
        let written = waiting
            .arrays(&self.options)
            .and_then(|arrays| RecordBatch::try_new(self.schema.clone(), arrays).map_err(|error| error.to_string()))
            .and_then(|batch| match &mut self.writer {
                Some(writer) => writer.write(&batch).map_err(|error| error.to_string()),
                None => unreachable!("the writer is taken only in finish"),
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

impl Waiting {
    fn new(options: &WriterOptions) -> Self {
        let latents = options.latent_columns().iter().map(|_| Numbers::zeros(options.dtype, 0)).collect();
        let captions = options.captions.map(WaitingCaptions::new);
        Self { latents, captions, ..Self::default() }
    }

    fn bytes(&self) -> usize {
        let captions = self.captions.as_ref().map_or(0, WaitingCaptions::bytes);
        self.latents.iter().map(Numbers::byte_len).sum::<usize>() + captions
    }

    /// `Err` with latent column, position and number, if the number type cannot hold one; nothing is appended then.
    fn push(&mut self, row: &Row<'_>, shape: &[usize]) -> Result<(), (usize, usize, f32)> {
        for (column, latent) in row.latents.iter().enumerate() {
            if let Err(at) = self.latents[column].narrow(latent) {
                for taken in &mut self.latents[..column] {
                    taken.truncate(taken.len() - latent.len());
                }
                return Err((column, at, latent[at]));
            }
        }
        if row.shape.is_some() {
            self.numels.push(shape.iter().product());
            self.shapes.push(shape.iter().map(|&dim| dim as i32).collect());
        }
        if let Some(captions) = &mut self.captions {
            captions.push(row.captions);
        }
        self.labels.extend(row.label);
        self.ids.push(row.id.to_owned());
        self.rows += 1;
        Ok(())
    }

    /// The columns, in the order of [`WriterOptions::schema`].
    fn arrays(self, options: &WriterOptions) -> Result<Vec<ArrayRef>, String> {
        let mut arrays: Vec<ArrayRef> = Vec::new();
        for numbers in self.latents {
            arrays.push(latent_array(numbers, options, &self.numels)?);
        }
        if options.row_shapes {
            let dims = Int32Array::from_iter_values(self.shapes.iter().flatten().copied());
            let offsets = OffsetBuffer::<i32>::from_lengths(self.shapes.iter().map(Vec::len));
            arrays.push(Arc::new(ListArray::new(layout::shape_item(), offsets, Arc::new(dims), None)));
        }
        arrays.extend(self.captions.map_or_else(Vec::new, WaitingCaptions::arrays));
        if options.labels {
            arrays.push(Arc::new(Int64Array::from(self.labels)));
        }
        arrays.push(Arc::new(StringArray::from(self.ids)));
        Ok(arrays)
    }
}

/// A latent column; `numels` counts the numbers of rows with shapes of their own.
fn latent_array(numbers: Numbers, options: &WriterOptions, numels: &[usize]) -> Result<ArrayRef, String> {
    let items = match numbers {
        numbers @ (Numbers::F16(_) | Numbers::F32(_)) => layout::numbers_array(numbers),
        Numbers::Bf16(numbers) => {
            let bytes = layout::little_endian(&numbers);
            if options.row_shapes {
                let offsets = OffsetBuffer::<i32>::from_lengths(numels.iter().map(|numel| numel * 2));
                return Ok(Arc::new(BinaryArray::new(offsets, bytes, None)));
            }
            let width = options.numel() as i32 * 2;
            return Ok(Arc::new(FixedSizeBinaryArray::try_new(width, bytes, None).map_err(|error| error.to_string())?));
        }
    };
    let item = layout::latent_item(options.dtype);
    if options.row_shapes {
        let offsets = OffsetBuffer::<i32>::from_lengths(numels.iter().copied());
        return Ok(Arc::new(ListArray::new(item, offsets, items, None)));
    }
    // `check` has bounded the latent at 2^28 numbers.
    Ok(Arc::new(FixedSizeListArray::new(item, options.numel() as i32, items, None)))
}
