//! A data set: the parquet files behind a URL, opened by their footers, read by rows.

use sha2::{Digest, Sha256};
use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use futures::StreamExt;
use object_store::ObjectStore;
use tokio::sync::OnceCell;

use crate::bounds::check_row_groups;
use crate::captions::CaptionLayout;
use crate::direct::Direct;
use crate::footer::{Footer, Label, SHAPE, VAE_DIGEST, missing};
use crate::form::{Dtype, Stored};
use crate::labels::LabelCache;
use crate::layout::{needs_first_row, settle};
use crate::read::Io;
use crate::shapes::template_text;
use crate::source::{Found, Location};
use crate::{CaptionMeta, DataError, LaneSchedule, RowBlock, RowOrder, RowShapes, ScheduleOptions, Shapes};
use crate::{Columns, OpenOptions};

/// Footers that are fetched at the same time.
const FOOTERS_AT_ONCE: usize = 16;

/// What a data set says about itself.
#[derive(Clone, Debug, PartialEq)]
pub struct DatasetMeta {
    /// Whether all rows have one shape.
    pub shapes: Shapes,
    /// Shape of one latent: `[channels, height, width]`, or `[channels, frames, height, width]` for video; empty where rows have
    /// shapes of their own.
    pub latent_shape: Vec<usize>,
    /// What stored latents are multiplied by before the model sees them.
    pub scaling_factor: Option<f64>,
    /// Labels lie in `0..num_classes`.
    pub num_classes: Option<usize>,
    /// Digest of the VAE that made the latents.
    pub vae_digest: Option<String>,
    /// Rows of all files.
    pub rows: u64,
    /// Whether rows have labels.
    pub labels: bool,
    /// Caption embeddings, where rows have them.
    pub captions: Option<CaptionMeta>,
    /// Whether posterior moments are stored instead of latents.
    pub moments: bool,
    /// Whether the mirrored image's latents are stored too.
    pub flipped: bool,
    /// Bytes of all stored latent numbers of one row; 0 where rows have shapes of their own.
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
    pub(crate) files: Vec<Footer>,
    row_groups: Vec<RowGroup>,
    pub(crate) stored: Vec<Stored>,
    has_shape_column: bool,
    pub(crate) captions: Option<CaptionLayout>,
    /// Read when first asked for; there from the start where all rows have one shape.
    pub(crate) row_shapes: OnceCell<Arc<RowShapes>>,
    /// Labels of row groups, for the short way to the latents.
    pub(crate) labels: LabelCache,
    /// The short way to the latents, where there is one.
    pub(crate) direct: Option<Direct>,
    pub(crate) io: Io,
}

impl fmt::Debug for LatentDataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LatentDataset").field("name", &self.name).field("meta", &self.meta).finish_non_exhaustive()
    }
}

impl LatentDataset {
    /// Opens a file, a folder (all `.parquet` files below it, sorted by path) or any URL that `object_store` knows, with
    /// credentials from the environment. Reads footers only.
    ///
    /// # Errors
    /// If a file cannot be read or breaks the contract, if files disagree, or parts of a numbered set are missing.
    pub fn open(url: &str, columns: &Columns) -> Result<Self, DataError> {
        Self::open_with(url, &OpenOptions::of(columns))
    }

    /// [`LatentDataset::open`], with a cache or other bounds on time.
    ///
    /// # Errors
    /// As [`LatentDataset::open`].
    pub fn open_with(url: &str, options: &OpenOptions) -> Result<Self, DataError> {
        Self::open_all([url], options)
    }

    /// Opens several locations as one data set, in the order in which they are named. Each is a file, a folder, or a name with
    /// ranges (`part-{00000..00007}-of-00008.parquet`) or wildcards (`train-*.parquet`).
    ///
    /// # Errors
    /// As [`LatentDataset::open`], or if a file is named twice.
    pub fn open_all<'a>(urls: impl IntoIterator<Item = &'a str>, options: &OpenOptions) -> Result<Self, DataError> {
        let (mut locations, mut errors) = (Vec::new(), Vec::new());
        for url in urls {
            match Location::parse(url, options) {
                Ok(location) => locations.push(location),
                Err(error) => errors.push(error),
            }
        }
        DataError::all(errors)?;
        Self::open_at(&locations, &options.columns)
    }

    /// The same in a store that the caller has made.
    ///
    /// # Errors
    /// As [`LatentDataset::open`].
    pub fn open_in(
        store: Arc<dyn ObjectStore>,
        path: object_store::path::Path,
        columns: &Columns,
    ) -> Result<Self, DataError> {
        Self::open_in_with(store, path, &OpenOptions::of(columns))
    }

    /// [`LatentDataset::open_in`], with a cache or other bounds on time. In a cache, files of different stores must have different
    /// paths or ETags.
    ///
    /// # Errors
    /// As [`LatentDataset::open`].
    pub fn open_in_with(
        store: Arc<dyn ObjectStore>,
        path: object_store::path::Path,
        options: &OpenOptions,
    ) -> Result<Self, DataError> {
        Self::open_at(&[Location::in_store(store, path, options)], &options.columns)
    }

    /// Opens what is sound of a data set, and tells what is not: files that cannot be read or differ from the first sound one are
    /// left out. For finding everything that is wrong.
    ///
    /// # Errors
    /// If nothing can be opened.
    pub fn open_sound(url: &str, columns: &Columns) -> Result<(Self, Vec<DataError>), DataError> {
        Self::open_parts(&[Location::parse(url, &OpenOptions::of(columns))?], columns)
    }

    fn open_at(locations: &[Location], columns: &Columns) -> Result<Self, DataError> {
        let (dataset, errors) = Self::open_parts(locations, columns)?;
        DataError::all(errors)?;
        Ok(dataset)
    }

    fn open_parts(locations: &[Location], columns: &Columns) -> Result<(Self, Vec<DataError>), DataError> {
        let name = match locations {
            [] => return Err(DataError::NoData { url: "`data.url`".into(), what: "the list of URLs is empty".into() }),
            [only] => only.name.clone(),
            [first, others @ ..] => format!("{} and {} more", first.name, others.len()),
        };
        let io = Io::new(&name)?;
        let mut found = Found::default();
        io.block_on(async {
            let mut of_locations = futures::stream::iter(locations).map(Location::files).buffered(FOOTERS_AT_ONCE);
            while let Some(of_location) = of_locations.next().await {
                found.add(of_location);
            }
        });
        let Found { files, mut errors } = found;
        let mut names = HashSet::new();
        errors.extend(files.iter().filter(|file| !names.insert(&file.name)).map(|file| DataError::Request {
            url: file.name.clone(),
            reason: "`data.url` names this file twice; every row may be there once".into(),
        }));
        let footers = io.block_on(async {
            let read = futures::stream::iter(files).map(|file| Footer::read(file, columns)).buffered(FOOTERS_AT_ONCE);
            read.collect::<Vec<_>>().await
        });
        let mut files: Vec<Footer> = Vec::with_capacity(footers.len());
        for footer in footers {
            let agreeing = footer.and_then(|footer| match files.first() {
                Some(first) => footer.agrees_with(first).map(|()| footer),
                None => Ok(footer),
            });
            match agreeing {
                Ok(footer) => files.push(footer),
                Err(error) => errors.push(error),
            }
        }
        match Self::of_files(name, columns, files, io) {
            Ok(dataset) => Ok((dataset, errors)),
            Err(error) if errors.is_empty() => Err(error),
            // Without files there is nothing to add to what is wrong with each.
            Err(DataError::NoData { .. }) => Err(DataError::some(errors)),
            Err(error) => {
                errors.push(error);
                Err(DataError::some(errors))
            }
        }
    }

    fn of_files(name: String, columns: &Columns, files: Vec<Footer>, io: Io) -> Result<Self, DataError> {
        let row_groups = row_groups(&files);
        let rows = row_groups.last().map_or(0, |group| group.first_row + group.rows);
        let Some(first) = files.first().filter(|_| rows > 0) else {
            return Err(DataError::NoData { url: name, what: "the parquet files have no row".into() });
        };
        DataError::all(first.bad_keys())?;
        let mut dataset = Self {
            meta: DatasetMeta {
                shapes: Shapes::Same,
                latent_shape: Vec::new(),
                scaling_factor: first.scaling_factor()?,
                num_classes: first.num_classes()?,
                vae_digest: first.keys.get(VAE_DIGEST).map(|digest| digest.trim_matches('"').to_owned()),
                rows,
                labels: first.label != Label::Absent,
                captions: None,
                moments: first.moments,
                flipped: first.flipped,
                row_bytes: 0,
                dtype: Dtype::F32,
                files: files.len(),
                row_groups: row_groups.len(),
            },
            name,
            columns: columns.clone(),
            files,
            row_groups,
            stored: Vec::new(),
            has_shape_column: false,
            captions: None,
            row_shapes: OnceCell::new(),
            labels: LabelCache::default(),
            direct: None,
            io,
        };
        dataset.settle_layout()?;
        let checked = dataset.files.iter().filter_map(|footer| check_row_groups(footer, dataset.meta.row_bytes).err());
        DataError::all(checked.collect())?;
        dataset.direct = Direct::of(&dataset.files, dataset.row_groups.len(), &dataset.stored);
        Ok(dataset)
    }

    fn settle_layout(&mut self) -> Result<(), DataError> {
        let first = &self.files[0];
        let (of_latents, of_captions) = (needs_first_row(first), CaptionLayout::needs_first_row(first));
        let first_row = if of_latents || of_captions { Some(self.first_row(of_latents, of_captions)?) } else { None };
        let layout = settle(first, first_row.as_ref(), &self.columns.shape, false)?;
        let captions = CaptionLayout::settle(first, first_row.as_ref())?;
        self.meta.captions = captions.as_ref().map(|layout| layout.meta);
        self.captions = captions;
        self.meta.dtype = layout.stored[0].dtype;
        self.meta.row_bytes = layout.stored.iter().map(|column| column.numel * column.dtype.bytes()).sum();
        if layout.shapes == Shapes::Same {
            self.row_shapes = OnceCell::new_with(Some(Arc::new(RowShapes::all_same(layout.shape.clone()))));
        }
        self.meta.shapes = layout.shapes;
        self.meta.latent_shape = layout.shape;
        self.stored = layout.stored;
        self.has_shape_column = layout.has_shape_column;
        Ok(())
    }

    /// What the data set says about itself.
    pub fn meta(&self) -> &DatasetMeta {
        &self.meta
    }

    /// The location for messages: the path, or the URL without secrets.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether [`Columns::shape`] says the shapes of the rows.
    pub(crate) fn has_shape_column(&self) -> bool {
        self.has_shape_column
    }

    /// Refuses a data set without labels; `what` needs them.
    ///
    /// # Errors
    /// [`DataError::MissingColumn`].
    pub fn require_labels(&self, what: &str) -> Result<(), DataError> {
        let first = &self.files[0];
        if self.meta.labels {
            return Ok(());
        }
        Err(missing(
            &first.file.name,
            &first.metadata,
            format!("`{}`, which {what} takes the class from", self.columns.label),
        ))
    }

    /// Refuses a data set whose rows have shapes of their own; `what` needs one shape.
    ///
    /// # Errors
    /// [`DataError::Request`].
    pub fn require_one_shape(&self, what: &str) -> Result<(), DataError> {
        let Shapes::Variable(dims) = &self.meta.shapes else { return Ok(()) };
        let told = match self.has_shape_column {
            true => format!("column `{}`", self.columns.shape),
            false => format!("metadata key `{SHAPE}`"),
        };
        let reason = format!(
            "rows have shapes of their own ({} by {told}), but {what} takes one; write the one shape as `{SHAPE}` if all rows have it, or name another column as `data.columns.shape`",
            template_text(dims)
        );
        Err(DataError::Request { url: self.name.clone(), reason })
    }

    /// Numbers in one latent; 0 where rows have shapes of their own.
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

    /// SHA-256 of the file names (without folders) and the row groups' sizes, in order: what [`LatentDataset::schedule`]
    /// depends on. Equal for a copy of the data set elsewhere.
    pub fn layout_sha256(&self) -> String {
        let mut digest = Sha256::new();
        for name in self.files() {
            digest.update(name.rsplit('/').next().unwrap_or(name));
            digest.update([0]);
        }
        for group in &self.row_groups {
            digest.update((group.file as u64).to_le_bytes());
            digest.update(group.rows.to_le_bytes());
        }
        digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Deals this data set's rows.
    ///
    /// # Errors
    /// As [`LaneSchedule::new`].
    pub fn schedule(&self, options: ScheduleOptions) -> Result<LaneSchedule, DataError> {
        let rows: Vec<u64> = self.row_groups.iter().map(|group| group.rows).collect();
        LaneSchedule::new(options, &rows)
    }

    /// Deals this data set's rows; in micro-batches of one shape each where rows have shapes of their own, which are read
    /// for that.
    ///
    /// # Errors
    /// As [`LaneSchedule::new`], [`RowOrder::bucketed`] and [`LatentDataset::row_shapes`].
    pub fn order(&self, options: ScheduleOptions) -> Result<RowOrder, DataError> {
        if self.meta.shapes == Shapes::Same {
            return Ok(self.schedule(options)?.into());
        }
        let rows: Vec<u64> = self.row_groups.iter().map(|group| group.rows).collect();
        let shapes = self.row_shapes()?;
        RowOrder::bucketed(options, &rows, shapes.shapes().len(), |row| shapes.index(row))
    }

    /// The factor to multiply stored latents with: the metadata's, else the config's, else 1.
    ///
    /// # Errors
    /// If both are given and differ.
    pub fn scaling_factor(&self, configured: Option<f64>) -> Result<f64, DataError> {
        match (self.meta.scaling_factor, configured) {
            (Some(stored), Some(configured)) if stored != configured => Err(DataError::Request {
                url: self.name.clone(),
                reason: format!(
                    "`data.scaling_factor` = {configured}, but the files say `ditharos.scaling_factor` = {stored}; remove the key from the config"
                ),
            }),
            (stored, configured) => Ok(stored.or(configured).unwrap_or(1.0)),
        }
    }

    /// Refuses a label outside of `num_classes` classes, or of the metadata's.
    pub(crate) fn check_labels(&self, block: &RowBlock, num_classes: Option<usize>) -> Result<(), DataError> {
        let Some(classes) = num_classes.or(self.meta.num_classes) else {
            return Ok(());
        };
        block
            .rows
            .iter()
            .zip(&block.labels)
            .find_map(|(&row, &label)| self.label_error(row, label, classes))
            .map_or(Ok(()), Err)
    }

    /// Refuses numbers that are not finite.
    pub(crate) fn check_finite(&self, block: &RowBlock) -> Result<(), DataError> {
        let mut latent = Vec::new();
        for column in 0..block.latent_columns() {
            for (index, &row) in block.rows().iter().enumerate() {
                latent.resize(block.latent_numel(index), 0.0);
                block.latent(column, index, &mut latent);
                if let Some(at) = latent.iter().position(|x| !x.is_finite()) {
                    let found = format!("{} at position {at}", latent[at]);
                    return Err(self.row_error(row, self.latent_column(column), found, "finite numbers".into()));
                }
            }
        }
        Ok(())
    }

    /// The error of a label that is no class.
    pub(crate) fn label_error(&self, row: u64, label: i64, classes: usize) -> Option<DataError> {
        let is_class = usize::try_from(label).is_ok_and(|label| label < classes);
        (!is_class)
            .then(|| self.row_error(row, &self.columns.label, label.to_string(), format!("a class in 0..{classes}")))
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
        DataError::Row {
            file: file.file.name.clone(),
            row_group: group.index_in_file,
            row_in_file: self.row_in_file(row),
            column: column.to_owned(),
            found,
            expected,
        }
    }

    /// File and row in it, for messages.
    pub(crate) fn place_of(&self, row: u64) -> String {
        format!("{}: row {}", self.place(row).1.file.name, self.row_in_file(row))
    }

    fn row_in_file(&self, row: u64) -> u64 {
        let file = self.place(row).0.file;
        row - self.row_groups.iter().find(|group| group.file == file).map_or(0, |first| first.first_row)
    }

    fn place(&self, row: u64) -> (&RowGroup, &Footer) {
        let group = &self.row_groups[self.group_of(row)];
        (group, &self.files[group.file])
    }

    pub(crate) fn group_of(&self, row: u64) -> usize {
        self.row_groups.partition_point(|group| group.first_row + group.rows <= row)
    }
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

#[cfg(test)]
mod location_tests;
#[cfg(test)]
mod tests;
