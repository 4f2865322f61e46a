//! `latents verify`: whether a data set can be trusted.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::ControlFlow;

use parquet::arrow::async_reader::AsyncFileReader;
use serde::Serialize;

use super::Progress;
use super::in_order::in_order;
use crate::access::out_of_parquet;
use crate::decode::{BadRow, ids};
use crate::pages::pages;
use crate::source::ObjectReader;
use crate::{DataError, LatentDataset, RowBlock, RowGroup, RowRun};

/// How a data set is checked.
#[derive(Clone, Copy, Debug)]
pub struct VerifyOptions {
    /// Row groups that are checked at a time.
    pub threads: usize,
    /// Problems that are kept; the others are only counted.
    pub max_problems: usize,
    /// Labels must lie below it; without it, below the metadata's.
    pub num_classes: Option<usize>,
}

impl Default for VerifyOptions {
    fn default() -> Self {
        Self { threads: 2, max_problems: 100, num_classes: None }
    }
}

/// Something that is wrong, and where as far as it can be told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The file.
    pub file: Option<String>,
    /// The row group in the file.
    pub row_group: Option<usize>,
    /// The row in the file, from 0.
    pub row_in_file: Option<u64>,
    /// The whole story, with the place.
    pub message: String,
}

impl Problem {
    /// An error, or each of several.
    pub fn of(error: DataError) -> Vec<Self> {
        if let DataError::Several(errors) = error {
            return errors.into_iter().flat_map(Self::of).collect();
        }
        let (file, row_group, row_in_file) = match &error {
            DataError::Row { file, row_group, row_in_file, .. } => (Some(file), Some(*row_group), Some(*row_in_file)),
            DataError::RowGroup { file, row_group, .. } => (Some(file), Some(*row_group), None),
            DataError::Store { file, .. }
            | DataError::Damaged { file, .. }
            | DataError::MissingColumn { file, .. }
            | DataError::ColumnType { file, .. }
            | DataError::Metadata { file, .. }
            | DataError::Disagreement { file, .. } => (Some(file), None, None),
            _ => (None, None, None),
        };
        vec![Self { file: file.cloned(), row_group, row_in_file, message: error.to_string() }]
    }
}

/// What was checked and what is wrong.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verification {
    /// The location, without secrets.
    pub url: String,
    /// Parquet files.
    pub files: usize,
    /// Row groups.
    pub row_groups: usize,
    /// Rows that were read.
    pub rows: u64,
    /// Pages of all columns.
    pub pages: u64,
    /// Pages without a checksum: a changed bit in them is found only where it makes them unreadable or a number no number.
    pub pages_without_checksum: u64,
    /// Captions that were read.
    pub captions: u64,
    /// Rows whose id was compared with all others'.
    pub ids: u64,
    /// The first problems, in the order of the data set; equal ids come last.
    pub problems: Vec<Problem>,
    /// Problems beyond those.
    pub more_problems: u64,
}

impl Verification {
    /// Whether nothing is wrong.
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    /// Puts what was wrong with the files as a whole before what was found in them.
    pub fn with_errors_of_files(mut self, errors: Vec<DataError>) -> Self {
        self.problems.splice(0..0, errors.into_iter().flat_map(Problem::of));
        self
    }

    fn keep(&mut self, found: Found, most: usize) {
        self.pages += found.pages;
        self.pages_without_checksum += found.pages_without_checksum;
        self.rows += found.rows;
        self.captions += found.captions;
        let free = most.saturating_sub(self.problems.len());
        self.more_problems += found.more_problems + found.problems.len().saturating_sub(free) as u64;
        self.problems.extend(found.problems.into_iter().take(free));
    }
}

/// What was found in a row group.
#[derive(Default)]
struct Found {
    rows: u64,
    pages: u64,
    pages_without_checksum: u64,
    captions: u64,
    problems: Vec<Problem>,
    more_problems: u64,
    id_hashes: Vec<u64>,
}

impl Found {
    fn add(&mut self, error: DataError, most: usize) {
        for problem in Problem::of(error) {
            if self.problems.len() < most { self.problems.push(problem) } else { self.more_problems += 1 }
        }
    }
}

/// Reads every page of every column and compares its checksum if it has one; decodes the columns that the data set uses; looks for
/// nulls, wrong lengths, NaN and infinite numbers, labels that are no class, and ids that two rows share.
///
/// Of nulls and wrong lengths the first of a row group is named, and the rest of that group is not looked at. Memory: a row
/// group for each thread, and 16 bytes for each id.
pub fn verify_with(dataset: &LatentDataset, options: &VerifyOptions, progress: Progress<'_>) -> Verification {
    let meta = dataset.meta();
    let groups = dataset.row_groups();
    let mut report = Verification {
        url: dataset.name().to_owned(),
        files: meta.files,
        row_groups: meta.row_groups,
        ..Verification::default()
    };
    // A hash of each id, with its row group.
    let mut hashes: Vec<(u64, u32)> = Vec::new();
    in_order(
        groups.len(),
        options.threads,
        |at| check(dataset, &groups[at], options),
        |at, mut found| {
            hashes.extend(found.id_hashes.drain(..).map(|hash| (hash, at as u32)));
            report.keep(found, options.max_problems);
            progress(groups[at].first_row + groups[at].rows);
            ControlFlow::Continue(())
        },
    );
    report.ids = hashes.len() as u64;
    let mut found = Found::default();
    equal_ids(dataset, hashes, options.max_problems, &mut found);
    report.keep(found, options.max_problems);
    report
}

/// Every problem in words: [`verify_with`] no limit to their number.
pub fn verify(dataset: &LatentDataset) -> Vec<String> {
    let options = VerifyOptions { max_problems: usize::MAX, ..VerifyOptions::default() };
    let report = verify_with(dataset, &options, &mut |_| ());
    report.problems.into_iter().map(|problem| problem.message).collect()
}

fn check(dataset: &LatentDataset, group: &RowGroup, options: &VerifyOptions) -> Found {
    let most = options.max_problems;
    let mut found = Found::default();
    if let Err(error) = check_pages(dataset, group, &mut found) {
        // What is damaged is not decoded.
        found.add(error, most);
        return found;
    }
    match dataset.read_row_group(group) {
        Ok(block) => check_rows(dataset, &block, options, &mut found),
        Err(error) => found.add(error, most),
    }
    if dataset.meta().captions.is_some() {
        let run = RowRun { first_row: group.first_row, rows: group.rows };
        match dataset.read_captions(&[run]) {
            Ok(block) => {
                found.captions += (0..block.len()).map(|index| block.count(index) as u64).sum::<u64>();
                dataset.bad_captions(run, &block).for_each(|error| found.add(error, most));
            }
            Err(error) => found.add(error, most),
        }
    }
    found
}

/// Walks the pages of all columns of a row group.
fn check_pages(dataset: &LatentDataset, group: &RowGroup, found: &mut Found) -> Result<(), DataError> {
    let footer = &dataset.files[group.file];
    for column in footer.metadata.metadata().row_group(group.index_in_file).columns() {
        let damaged = |reason: String| DataError::RowGroup {
            file: footer.file.name.clone(),
            row_group: group.index_in_file,
            reason: format!("column {}: {reason}", column.column_path().string()),
        };
        let (start, length) = column.byte_range();
        let mut reader = ObjectReader(footer.file.clone());
        let read = dataset.io.block_on(reader.get_bytes(start..start + length));
        let chunk = read.map_err(|error| out_of_parquet(error, &footer.file.name, damaged))?;
        for (number, page) in pages(&chunk).enumerate() {
            let page = page.map_err(damaged)?;
            found.pages += 1;
            let Some(expected) = page.crc else {
                found.pages_without_checksum += 1;
                continue;
            };
            let crc = crc32fast::hash(&chunk[page.start..page.start + page.bytes]);
            if crc != expected {
                return Err(damaged(format!(
                    "page {number} at byte {} of the file has checksum {crc:08x}, but was written with {expected:08x}",
                    start + page.start as u64
                )));
            }
        }
    }
    Ok(())
}

fn check_rows(dataset: &LatentDataset, block: &RowBlock, options: &VerifyOptions, found: &mut Found) {
    let most = options.max_problems;
    let classes = options.num_classes.or(dataset.meta().num_classes);
    let mut latent = Vec::new();
    found.rows += block.len() as u64;
    for (index, &row) in block.rows().iter().enumerate() {
        latent.resize(block.latent_numel(index), 0f32);
        for column in 0..block.latent_columns() {
            block.latent(column, index, &mut latent);
            if let Some(at) = latent.iter().position(|number| !number.is_finite()) {
                let text = format!("{} at position {at}", latent[at]);
                found.add(dataset.row_error(row, dataset.latent_column(column), text, "finite numbers".into()), most);
            }
        }
        let error = match (block.labels().get(index).copied(), classes) {
            (None, _) => None,
            (Some(label), Some(classes)) => dataset.label_error(row, label, classes),
            (Some(label), None) => (label < 0).then(|| {
                dataset.row_error(row, &dataset.columns().label, label.to_string(), "a class from 0 on".into())
            }),
        };
        if let Some(error) = error {
            found.add(error, most);
        }
    }
    found.id_hashes.extend(block.ids.iter().map(|id| id_hash(id)));
}

fn id_hash(id: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    id.hash(&mut hasher);
    hasher.finish()
}

/// Names the rows whose id an earlier row has. Only the ids of row groups with a hash that occurs twice are read again.
fn equal_ids(dataset: &LatentDataset, mut hashes: Vec<(u64, u32)>, most: usize, found: &mut Found) {
    hashes.sort_unstable();
    let twice: Vec<(u64, u32)> =
        hashes.chunk_by(|a, b| a.0 == b.0).filter(|equal| equal.len() > 1).flatten().copied().collect();
    drop(hashes);
    let mut groups: Vec<u32> = twice.iter().map(|(_, group)| *group).collect();
    groups.sort_unstable();
    groups.dedup();
    let mut first_of = std::collections::HashMap::new();
    for at in groups {
        let group = &dataset.row_groups()[at as usize];
        match ids_of(dataset, at as usize) {
            Ok(ids) => {
                for (row, id) in (group.first_row..).zip(ids) {
                    if twice.binary_search_by_key(&id_hash(&id), |(hash, _)| *hash).is_err() {
                        continue;
                    }
                    if let Some(first) = first_of.get(&id) {
                        let expected = format!("an id that no other row has; row {first} of the data set has it too");
                        found.add(dataset.row_error(row, &dataset.columns().id, format!("`{id}`"), expected), most);
                    } else {
                        first_of.insert(id, row);
                    }
                }
            }
            Err(error) => found.add(error, most),
        }
    }
}

fn ids_of(dataset: &LatentDataset, at: usize) -> Result<Vec<String>, DataError> {
    let group = &dataset.row_groups()[at];
    let column = &dataset.columns().id;
    let mut all = Vec::with_capacity(group.rows as usize);
    for array in dataset.io.block_on(dataset.fetch_group(at, column))? {
        let first = group.first_row + all.len() as u64;
        let bad = |bad: BadRow| dataset.row_error(first + bad.row as u64, column, bad.found, bad.expected);
        all.extend(ids(&array).map_err(bad)?);
    }
    Ok(all)
}
