//! A data set: the parquet files behind a URL, opened by their footers, read by rows.

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use arrow::array::RecordBatch;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::ObjectStore;
use parquet::arrow::arrow_reader::RowSelection;
use parquet::arrow::{ParquetRecordBatchStreamBuilder, ProjectionMask};
use tokio::runtime::Runtime;

use crate::columns::Columns;
use crate::decode::{self, BadRow, Flat, RowBlock, first_lengths};
use crate::footer::{Footer, SHAPE, VAE_DIGEST};
use crate::form::{Dtype, Form, Leaf, Stored};
use crate::schedule::RowRun;
use crate::source::{Location, ObjectReader};
use crate::{DataError, LaneSchedule, ScheduleOptions};

/// Footers that are fetched at the same time.
const FOOTERS_AT_ONCE: usize = 16;
/// Row groups that are fetched at the same time for one read.
const ROW_GROUPS_AT_ONCE: usize = 8;
/// Rows that the parquet reader hands over at a time.
const BATCH_ROWS: usize = 1024;

/// What a data set says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct DatasetMeta {
    /// Shape of one latent: `[channels, height, width]`.
    pub latent_shape: Vec<usize>,
    /// What stored latents are multiplied by before the model sees them.
    pub scaling_factor: Option<f64>,
    /// Labels lie in `0..num_classes`.
    pub num_classes: Option<usize>,
    /// Digest of the VAE that made the latents.
    pub vae_digest: Option<String>,
    /// Rows of all files.
    pub rows: u64,
    /// Whether posterior moments are stored instead of latents.
    pub moments: bool,
    /// Whether the mirrored image's latents are stored too.
    pub flipped: bool,
    /// Bytes of all stored latent numbers of one row.
    pub row_bytes: usize,
    /// The number type of the (first) latent column.
    pub dtype: Dtype,
    /// Parquet files.
    pub files: usize,
    /// Row groups of all files.
    pub row_groups: usize,
}

/// A row group of the data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowGroup {
    /// The file's number in the data set.
    pub file: usize,
    /// The row group's number in the file.
    pub index_in_file: usize,
    /// The data set row at which it starts.
    pub first_row: u64,
    /// Its rows.
    pub rows: u64,
}

/// Parquet files of latents, opened. Reading is by row number; see [`crate::MicroBatchStream`] for training.
pub struct LatentDataset {
    name: String,
    meta: DatasetMeta,
    columns: Columns,
    files: Vec<Footer>,
    row_groups: Vec<RowGroup>,
    stored: Vec<Stored>,
    io: Io,
}

impl fmt::Debug for LatentDataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatentDataset").field("name", &self.name).field("meta", &self.meta).finish_non_exhaustive()
    }
}

/// A part of a row group that a read wants, and where it goes.
struct Piece {
    first_in_group: u64,
    rows: u64,
    to: usize,
}

impl LatentDataset {
    /// Opens a file, a folder (all `.parquet` files below it, sorted by path) or any URL that `object_store` knows, with
    /// credentials from the environment. Reads footers only.
    ///
    /// # Errors
    /// If a file cannot be read or breaks the contract, if files disagree, or parts of a numbered set are missing.
    pub fn open(url: &str, columns: &Columns) -> Result<Self, DataError> {
        Self::open_at(Location::parse(url)?, columns)
    }

    /// The same in a store that the caller has made.
    ///
    /// # Errors
    /// As [`LatentDataset::open`].
    pub fn open_in(store: Arc<dyn ObjectStore>, path: object_store::path::Path, columns: &Columns) -> Result<Self, DataError> {
        Self::open_at(Location::in_store(store, path), columns)
    }

    fn open_at(location: Location, columns: &Columns) -> Result<Self, DataError> {
        let io = Io::new(&location.name)?;
        let read = async {
            let files = location.files().await?;
            let footers = futures::stream::iter(files).map(|file| Footer::read(file, columns)).buffered(FOOTERS_AT_ONCE);
            Ok::<_, DataError>(footers.collect::<Vec<_>>().await)
        };
        let (files, mut errors) = split(io.block_on(read)?);
        if let Some((first, others)) = files.split_first() {
            errors.extend(others.iter().filter_map(|file| file.agrees_with(first).err()));
        }
        DataError::all(errors)?;
        let row_groups = row_groups(&files);
        let rows = row_groups.last().map_or(0, |group| group.first_row + group.rows);
        let Some(first) = files.first().filter(|_| rows > 0) else {
            return Err(DataError::NoData { url: location.name, what: "the parquet files have no row".into() });
        };
        let mut dataset = Self {
            meta: DatasetMeta {
                latent_shape: Vec::new(),
                scaling_factor: first.scaling_factor()?,
                num_classes: first.num_classes()?,
                vae_digest: first.keys.get(VAE_DIGEST).map(|digest| digest.trim_matches('"').to_owned()),
                rows,
                moments: first.moments,
                flipped: first.flipped,
                row_bytes: 0,
                dtype: Dtype::F32,
                files: files.len(),
                row_groups: row_groups.len(),
            },
            name: location.name,
            columns: columns.clone(),
            files,
            row_groups,
            stored: Vec::new(),
            io,
        };
        dataset.settle_shape()?;
        Ok(dataset)
    }

    /// Settles the shape and the layout of each latent column, looking at the first row where the types leave it open.
    fn settle_shape(&mut self) -> Result<(), DataError> {
        let first = &self.files[0];
        let bytes_dtype = first.dtype()?;
        let open = |form: &Form| form.levels.iter().any(Option::is_none) || form.leaf == Leaf::Bytes(None);
        let first_row = if first.latents.iter().any(|(_, form)| open(form)) { Some(self.first_row()?) } else { None };
        let lengths = |name: &str, form: &Form| match &first_row {
            Some(batch) => batch.column_by_name(name).map(first_lengths).unwrap_or_default(),
            None => form.levels.iter().copied().flatten().collect(),
        };
        let (name, form) = &first.latents[0];
        let shape = match first.shape()? {
            Some(shape) => shape,
            None if form.levels.len() < 2 => {
                let reason = format!("is absent, and column `{name}` is {form}, which does not tell the shape; write it as a JSON array such as [4,32,32]");
                return Err(DataError::Metadata { file: first.file.name.clone(), key: SHAPE.into(), reason });
            }
            None => {
                let shape = lengths(name, form);
                if shape.len() != form.levels.len() || crate::form::shape_numel(&shape).is_none() {
                    let reason = format!("is absent, and the first row of column `{name}` has lists of lengths {shape:?}; expected {} positive lengths", form.levels.len());
                    return Err(DataError::Metadata { file: first.file.name.clone(), key: SHAPE.into(), reason });
                }
                shape
            }
        };
        let mut stored = Vec::new();
        for (name, form) in &first.latents {
            let first_len_bytes = if form.levels.is_empty() { lengths(name, form).first().copied() } else { None };
            let column = Stored::resolve(name, form, &shape, bytes_dtype, first_len_bytes).map_err(|reason| DataError::Metadata {
                file: first.file.name.clone(),
                key: SHAPE.into(),
                reason: format!("column `{name}` {reason}"),
            })?;
            stored.push(column);
        }
        self.meta.dtype = stored[0].dtype;
        self.meta.row_bytes = stored.iter().map(|column| column.numel * column.dtype.bytes()).sum();
        self.meta.latent_shape = shape;
        self.stored = stored;
        Ok(())
    }

    /// The latent columns of the first row of the data set.
    fn first_row(&self) -> Result<RecordBatch, DataError> {
        // `open_at` has seen that there is a row.
        let batches = self.io.block_on(self.fetch(self.group_of(0), &[Piece { first_in_group: 0, rows: 1, to: 0 }], false))?;
        batches.into_iter().next().ok_or_else(|| DataError::NoData { url: self.name.clone(), what: "the parquet files have no row".into() })
    }

    /// What the data set says about itself.
    pub fn meta(&self) -> &DatasetMeta {
        &self.meta
    }

    /// The location for messages: the path, or the URL without secrets.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Numbers in one latent.
    pub fn latent_numel(&self) -> usize {
        self.stored[0].numel
    }

    /// The row groups of all files, in data set order.
    pub fn row_groups(&self) -> &[RowGroup] {
        &self.row_groups
    }

    /// Names of the files, in data set order.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|footer| footer.file.name.as_str())
    }

    /// Deals this data set's rows.
    ///
    /// # Errors
    /// As [`LaneSchedule::new`].
    pub fn schedule(&self, options: ScheduleOptions) -> Result<LaneSchedule, DataError> {
        let rows: Vec<u64> = self.row_groups.iter().map(|group| group.rows).collect();
        LaneSchedule::new(options, &rows)
    }

    /// The factor to multiply stored latents with: the metadata's, else the config's, else 1.
    ///
    /// # Errors
    /// If both are given and differ.
    pub fn scaling_factor(&self, configured: Option<f64>) -> Result<f64, DataError> {
        match (self.meta.scaling_factor, configured) {
            (Some(stored), Some(configured)) if stored != configured => Err(DataError::Request {
                url: self.name.clone(),
                reason: format!("`data.scaling_factor` = {configured}, but the files say `ditharos.scaling_factor` = {stored}; remove the key from the config"),
            }),
            (stored, configured) => Ok(stored.or(configured).unwrap_or(1.0)),
        }
    }

    /// Reads rows, in the order of `runs`, which must not overlap.
    ///
    /// # Errors
    /// If a row does not exist, cannot be read, is null or has the wrong length, or its label is no class.
    pub fn read(&self, runs: &[RowRun]) -> Result<RowBlock, DataError> {
        let block = self.io.block_on(self.read_runs(runs, false))?;
        self.check_labels(&block, None)?;
        Ok(block)
    }

    /// Reads one row group with the ids (if the column is there) and without checking the label's range.
    pub(crate) fn read_row_group(&self, group: &RowGroup) -> Result<RowBlock, DataError> {
        let with_ids = self.files[group.file].metadata.schema().column_with_name(&self.columns.id).is_some();
        self.io.block_on(self.read_runs(&[RowRun { first_row: group.first_row, rows: group.rows }], with_ids))
    }

    pub(crate) fn io(&self) -> &Io {
        &self.io
    }

    /// Refuses a label outside of `num_classes` classes, or of the metadata's.
    pub(crate) fn check_labels(&self, block: &RowBlock, num_classes: Option<usize>) -> Result<(), DataError> {
        let Some(classes) = num_classes.or(self.meta.num_classes) else { return Ok(()) };
        block.rows.iter().zip(&block.labels).find_map(|(&row, &label)| self.label_error(row, label, classes)).map_or(Ok(()), Err)
    }

    /// The error of a label that is no class.
    pub(crate) fn label_error(&self, row: u64, label: i64, classes: usize) -> Option<DataError> {
        let is_class = usize::try_from(label).is_ok_and(|label| label < classes);
        (!is_class).then(|| self.row_error(row, &self.columns.label, label.to_string(), format!("a class in 0..{classes}")))
    }

    /// The column names that the data set was opened with.
    pub(crate) fn columns(&self) -> &Columns {
        &self.columns
    }

    /// The name of a latent column of a [`RowBlock`].
    pub(crate) fn latent_column(&self, column: usize) -> &str {
        &self.stored[column].name
    }

    /// An error about a data set row.
    pub(crate) fn row_error(&self, row: u64, column: &str, found: String, expected: String) -> DataError {
        let (group, file) = self.place(row);
        let first_of_file = self.row_groups.iter().find(|other| other.file == group.file).map_or(0, |first| first.first_row);
        DataError::Row {
            file: file.file.name.clone(),
            row_group: group.index_in_file,
            row_in_file: row - first_of_file,
            column: column.to_owned(),
            found,
            expected,
        }
    }

    fn place(&self, row: u64) -> (&RowGroup, &Footer) {
        let group = &self.row_groups[self.group_of(row)];
        (group, &self.files[group.file])
    }

    fn group_of(&self, row: u64) -> usize {
        self.row_groups.partition_point(|group| group.first_row + group.rows <= row)
    }

    /// Reads rows; of each row group only the pages that hold them, where the file has an offset index.
    pub(crate) async fn read_runs(&self, runs: &[RowRun], with_ids: bool) -> Result<RowBlock, DataError> {
        let mut wanted: BTreeMap<usize, Vec<Piece>> = BTreeMap::new();
        let mut rows = Vec::new();
        for run in runs {
            if run.first_row.checked_add(run.rows).is_none_or(|end| end > self.meta.rows) {
                let reason = format!("rows {} to {} were asked for; there are {}", run.first_row, run.first_row.saturating_add(run.rows), self.meta.rows);
                return Err(DataError::Request { url: self.name.clone(), reason });
            }
            let (mut next, end) = (run.first_row, run.first_row + run.rows);
            while next < end {
                let at = self.group_of(next);
                let group = &self.row_groups[at];
                let until = end.min(group.first_row + group.rows);
                wanted.entry(at).or_default().push(Piece { first_in_group: next - group.first_row, rows: until - next, to: rows.len() });
                rows.extend(next..until);
                next = until;
            }
        }
        let mut block = RowBlock::zeros(&self.stored, rows, with_ids);
        for (at, pieces) in &mut wanted {
            pieces.sort_by_key(|piece| piece.first_in_group);
            if let Some(pair) = pieces.windows(2).find(|pair| pair[0].first_in_group + pair[0].rows > pair[1].first_in_group) {
                let reason = format!("row {} was asked for twice in one read", self.row_groups[*at].first_row + pair[1].first_in_group);
                return Err(DataError::Request { url: self.name.clone(), reason });
            }
        }
        let mut fetched = futures::stream::iter(&wanted)
            .map(|(&at, pieces)| async move {
                let file = &self.files[self.row_groups[at].file].file.name;
                let batches = AssertUnwindSafe(self.fetch(at, pieces, with_ids)).catch_unwind().await;
                (at, pieces, batches.unwrap_or_else(|payload| Err(DataError::panicked(file, &*payload))))
            })
            .buffer_unordered(ROW_GROUPS_AT_ONCE);
        while let Some((at, pieces, batches)) = fetched.next().await {
            self.place_rows(at, pieces, &batches?, &mut block)?;
        }
        Ok(block)
    }

    /// Fetches and decodes pieces of one row group.
    async fn fetch(&self, at: usize, pieces: &[Piece], with_ids: bool) -> Result<Vec<RecordBatch>, DataError> {
        let group = &self.row_groups[at];
        let footer = &self.files[group.file];
        let names = footer.latents.iter().map(|(name, _)| name.as_str()).chain([self.columns.label.as_str()]).chain(with_ids.then_some(self.columns.id.as_str()));
        let roots: Vec<usize> = names.filter_map(|name| footer.metadata.schema().index_of(name).ok()).collect();
        let selection = RowSelection::from_consecutive_ranges(
            pieces.iter().map(|piece| piece.first_in_group as usize..(piece.first_in_group + piece.rows) as usize),
            group.rows as usize,
        );
        let rows: u64 = pieces.iter().map(|piece| piece.rows).sum();
        let builder = ParquetRecordBatchStreamBuilder::new_with_metadata(ObjectReader(footer.file.clone()), footer.metadata.clone());
        let projection = ProjectionMask::roots(builder.parquet_schema(), roots);
        let stream = builder
            .with_projection(projection)
            .with_row_groups(vec![group.index_in_file])
            .with_row_selection(selection)
            .with_batch_size(BATCH_ROWS.min(rows as usize))
            .build();
        let failed = |reason: String| DataError::RowGroup { file: footer.file.name.clone(), row_group: group.index_in_file, reason };
        let batches: Vec<RecordBatch> = match stream {
            Ok(stream) => stream.try_collect().await.map_err(|error| failed(error.to_string()))?,
            Err(error) => return Err(failed(error.to_string())),
        };
        let found: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if found as u64 != rows {
            return Err(failed(format!("{found} rows came out; expected {rows}")));
        }
        Ok(batches)
    }

    /// Checks decoded batches and copies their rows to where the pieces want them.
    fn place_rows(&self, at: usize, pieces: &[Piece], batches: &[RecordBatch], block: &mut RowBlock) -> Result<(), DataError> {
        let group = &self.row_groups[at];
        let footer = &self.files[group.file];
        let mut first = 0;
        for batch in batches {
            let targets = targets(pieces, first..first + batch.num_rows());
            let bad = |column: &str, bad: BadRow| {
                let to = targets.iter().find(|(rows, _)| rows.contains(&bad.row)).map_or(0, |(rows, to)| to + bad.row - rows.start);
                self.row_error(block.rows[to], column, bad.found, bad.expected)
            };
            let column = |name: &str| {
                batch.column_by_name(name).ok_or_else(|| DataError::RowGroup {
                    file: footer.file.name.clone(),
                    row_group: group.index_in_file,
                    reason: format!("column `{name}` did not come out"),
                })
            };
            let mut flats = Vec::with_capacity(self.stored.len());
            for stored in &self.stored {
                flats.push(Flat::of(column(&stored.name)?, stored).map_err(|error| bad(&stored.name, error))?);
            }
            let labels = decode::labels(column(&self.columns.label)?).map_err(|error| bad(&self.columns.label, error))?;
            let ids = if block.ids.is_empty() {
                None
            } else {
                Some(decode::ids(column(&self.columns.id)?).map_err(|error| bad(&self.columns.id, error))?)
            };
            for (rows, to) in &targets {
                for (flat, (stored, out)) in flats.iter().zip(self.stored.iter().zip(&mut block.latents)) {
                    flat.copy(rows.start * stored.numel, rows.len() * stored.numel, out, to * stored.numel);
                }
                block.labels[*to..to + rows.len()].copy_from_slice(&labels[rows.clone()]);
                if let Some(ids) = &ids {
                    block.ids[*to..to + rows.len()].clone_from_slice(&ids[rows.clone()]);
                }
            }
            first += batch.num_rows();
        }
        Ok(())
    }
}

/// Where the rows of a batch go: rows of the batch, and the place of the first of them in the block. `selected` counts the
/// batch's rows among all rows of the pieces.
fn targets(pieces: &[Piece], selected: Range<usize>) -> Vec<(Range<usize>, usize)> {
    let mut targets = Vec::new();
    let mut piece_start = 0;
    for piece in pieces {
        let piece_end = piece_start + piece.rows as usize;
        let (start, end) = (piece_start.max(selected.start), piece_end.min(selected.end));
        if start < end {
            targets.push((start - selected.start..end - selected.start, piece.to + (start - piece_start)));
        }
        piece_start = piece_end;
    }
    targets
}

fn split(results: Vec<Result<Footer, DataError>>) -> (Vec<Footer>, Vec<DataError>) {
    let (mut footers, mut errors) = (Vec::new(), Vec::new());
    for result in results {
        match result {
            Ok(footer) => footers.push(footer),
            Err(error) => errors.push(error),
        }
    }
    (footers, errors)
}

fn row_groups(files: &[Footer]) -> Vec<RowGroup> {
    let mut groups = Vec::new();
    let mut first_row = 0u64;
    for (file, footer) in files.iter().enumerate() {
        for (index_in_file, group) in footer.metadata.metadata().row_groups().iter().enumerate() {
            // `Footer::read` has refused negative counts.
            let rows = group.num_rows() as u64;
            groups.push(RowGroup { file, index_in_file, first_row, rows });
            first_row += rows;
        }
    }
    groups
}

/// The thread that fetches, behind the blocking calls.
pub(crate) struct Io(Option<Runtime>);

impl Io {
    fn new(name: &str) -> Result<Self, DataError> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("latents-io").enable_all().build();
        match runtime {
            Ok(runtime) => Ok(Self(Some(runtime))),
            Err(error) => Err(DataError::Request { url: name.into(), reason: format!("the I/O thread cannot be started: {error}") }),
        }
    }

    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        match &self.0 {
            Some(runtime) => runtime.block_on(future),
            None => unreachable!("the runtime is taken only in drop"),
        }
    }
}

impl Drop for Io {
    /// Does not wait for a request that hangs.
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;
    use crate::WriterOptions;
    use crate::testing::{sample, samples, write};

    fn options() -> WriterOptions {
        WriterOptions { row_group_rows: 30, num_classes: Some(10), ..WriterOptions::new(vec![1, 2, 3]) }
    }

    fn open(path: &Path) -> Result<LatentDataset, DataError> {
        LatentDataset::open(path.to_str().unwrap(), &Columns::default())
    }

    /// Two files, 50 and 45 rows of one numbered sequence.
    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let mut rows = samples(95, &options());
        let second = rows.split_off(50);
        std::fs::create_dir(folder.path().join("b")).unwrap();
        write(&folder.path().join("a.parquet"), options(), &rows);
        write(&folder.path().join("b/0.parquet"), options(), &second);
        folder
    }

    #[test]
    fn files_of_a_folder_are_one_sequence_of_rows() {
        let folder = folder();
        std::fs::write(folder.path().join("README.txt"), "not data").unwrap();
        let dataset = open(folder.path()).unwrap();
        assert_eq!((dataset.meta().rows, dataset.meta().files, dataset.meta().row_groups), (95, 2, 4));
        let names: Vec<&str> = dataset.files().collect();
        assert!(names[0].ends_with("/a.parquet") && names[1].ends_with("/b/0.parquet"), "{names:?}");
        // Backwards, across row groups and files, and leaving rows out.
        let runs = [RowRun { first_row: 90, rows: 5 }, RowRun { first_row: 3, rows: 2 }, RowRun { first_row: 28, rows: 40 }, RowRun { first_row: 10, rows: 1 }];
        let block = dataset.read(&runs).unwrap();
        let expected: Vec<u64> = runs.iter().flat_map(|run| run.first_row..run.first_row + run.rows).collect();
        assert_eq!(block.rows(), expected);
        let mut latent = [0f32; 6];
        for (index, &row) in expected.iter().enumerate() {
            let sample = sample(row as usize, &options());
            assert_eq!(block.labels()[index], sample.label);
            for column in 0..2 {
                block.latent(column, index, &mut latent);
                assert_eq!(latent[..], sample.latents[column][..], "row {row} column {column}");
            }
        }
    }

    #[test]
    fn a_single_file_and_a_url_with_escapes_open_too() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b%.parquet");
        write(&path, options(), &samples(9, &options()));
        assert_eq!(open(&path).unwrap().meta().rows, 9);
        let url = url::Url::from_file_path(&path).unwrap();
        assert_eq!(LatentDataset::open(url.as_str(), &Columns::default()).unwrap().meta().rows, 9);
    }

    #[test]
    fn rows_that_are_not_there_or_asked_for_twice_are_refused() {
        let folder = folder();
        let dataset = open(folder.path()).unwrap();
        for (runs, words) in [
            (vec![RowRun { first_row: 90, rows: 6 }], "there are 95"),
            (vec![RowRun { first_row: u64::MAX, rows: 2 }], "there are 95"),
            (vec![RowRun { first_row: 10, rows: 5 }, RowRun { first_row: 12, rows: 1 }], "row 12 was asked for twice"),
        ] {
            let error = dataset.read(&runs).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(dataset.read(&[]).unwrap().is_empty());
    }

    #[test]
    fn damaged_files_are_each_named() {
        let folder = folder();
        let whole = std::fs::read(folder.path().join("a.parquet")).unwrap();
        std::fs::write(folder.path().join("half.parquet"), &whole[..whole.len() / 2]).unwrap();
        std::fs::write(folder.path().join("garbage.parquet"), [7; 5000]).unwrap();
        std::fs::write(folder.path().join("empty.parquet"), []).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        for name in ["half.parquet", "garbage.parquet", "empty.parquet", "3 problems", "cut short"] {
            assert!(error.contains(name), "{error}");
        }
        assert!(!error.contains("a.parquet"), "{error}");
    }

    #[test]
    fn a_footer_that_points_outside_of_its_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write(&path, options(), &samples(90, &options()));
        let whole = std::fs::read(&path).unwrap();
        let footer = u32::from_le_bytes(whole[whole.len() - 8..whole.len() - 4].try_into().unwrap()) as usize + 8;
        // The data is gone, the footer is whole.
        std::fs::write(&path, &[b"PAR1", &whole[whole.len() - footer..]].concat()).unwrap();
        let error = open(&path).unwrap_err().to_string();
        assert!(error.contains("a.parquet") && error.contains("damaged"), "{error}");
    }

    #[test]
    fn files_that_differ_are_refused_with_the_key() {
        let changes: [(&str, WriterOptions); 4] = [
            ("ditharos.latent_shape", WriterOptions { latent_shape: vec![1, 3, 2], ..options() }),
            ("ditharos.num_classes", WriterOptions { num_classes: Some(11), ..options() }),
            ("ditharos.scaling_factor", WriterOptions { scaling_factor: Some(0.5), ..options() }),
            ("latent_mean", WriterOptions { dtype: Dtype::F32, ..options() }),
        ];
        for (key, changed) in changes {
            let folder = folder();
            write(&folder.path().join("c.parquet"), changed.clone(), &samples(3, &changed));
            let error = open(folder.path()).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("c.parquet") && error.contains("a.parquet"), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let folder = folder();
        let path = folder.path().join("a.parquet");
        let missing = |columns: Columns| LatentDataset::open(path.to_str().unwrap(), &columns).unwrap_err().to_string();
        let error = missing(Columns { label: "class".into(), ..Columns::default() });
        assert!(error.contains("`class`") && error.contains("`label`") && error.contains("data.columns"), "{error}");
        let error = missing(Columns { latent_mean: "mu".into(), ..Columns::default() });
        assert!(error.contains("`mu`") && error.contains("`latent_mean`"), "{error}");
        let error = missing(Columns { label: "id".into(), ..Columns::default() });
        assert!(error.contains("`id`") && error.contains("integer"), "{error}");
        std::fs::rename(&path, folder.path().join("part-00001-of-00003.parquet")).unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("part-00000-of-00003.parquet, part-00002-of-00003.parquet"), "{error}");
        assert!(open(&folder.path().join("nowhere")).unwrap_err().to_string().contains("no such file"));
        std::fs::create_dir(folder.path().join("void")).unwrap();
        assert!(open(&folder.path().join("void")).unwrap_err().to_string().contains("no .parquet file"));
    }

    #[test]
    fn secrets_of_a_url_stay_out_of_errors() {
        for url in ["nosuch://secret@host/x", "s3://user:secret@host/x", "https://host/x?token=secret", "http://host/x#secret"] {
            let error = LatentDataset::open(url, &Columns::default()).unwrap_err().to_string();
            assert!(error.contains("://host/x") && !error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn a_scaling_factor_may_come_from_either_side_but_not_two_ways() {
        let folder = tempfile::tempdir().unwrap();
        let with = WriterOptions { scaling_factor: Some(0.18215), ..options() };
        write(&folder.path().join("with.parquet"), with.clone(), &samples(3, &with));
        write(&folder.path().join("without.parquet"), options(), &samples(3, &options()));
        let (with, without) = (open(&folder.path().join("with.parquet")).unwrap(), open(&folder.path().join("without.parquet")).unwrap());
        assert_eq!(with.scaling_factor(None).unwrap(), 0.18215);
        assert_eq!(with.scaling_factor(Some(0.18215)).unwrap(), 0.18215);
        assert!(with.scaling_factor(Some(0.5)).unwrap_err().to_string().contains("data.scaling_factor"));
        assert_eq!(without.scaling_factor(Some(0.5)).unwrap(), 0.5);
        assert_eq!(without.scaling_factor(None).unwrap(), 1.0);
    }
}
