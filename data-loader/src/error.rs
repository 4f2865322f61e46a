//! What can go wrong between a URL and a micro-batch.

/// An error of this crate. Every variant names the place; URLs are shown without user-info and query.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The URL cannot be turned into a store.
    #[error(
        "{url}: not a data set location that can be opened: {reason}; give a path or a file://, s3://, gs://, az:// or https:// URL"
    )]
    Location {
        /// The redacted URL.
        url: String,
        /// What was wrong.
        reason: String,
    },
    /// The store did not answer, or has no such object.
    #[error("{file}: cannot be read: {source}")]
    Store {
        /// The redacted URL of the file or folder.
        file: String,
        /// The store's own words.
        source: object_store::Error,
    },
    /// A remote file or folder cannot be read, or changed while it was read.
    #[error(transparent)]
    Remote(#[from] stores::ReadError),
    /// There is no parquet file at the location, or no row in the files.
    #[error("{url}: {what}; expected a .parquet file, or a folder with .parquet files in it (see `trainer encode`)")]
    NoData {
        /// The redacted URL.
        url: String,
        /// What is missing.
        what: String,
    },
    /// Parts of a set `…-00003-of-00008.parquet` are absent.
    #[error("{folder}: parts of the data set are missing: {}; copy them there, or remove `-of-` from the names if this is meant", .missing.join(", "))]
    MissingParts {
        /// The redacted URL of the data set.
        folder: String,
        /// The names of the missing files.
        missing: Vec<String>,
    },
    /// A file is no readable parquet file.
    #[error(
        "{file}: not a readable parquet file ({file_bytes} bytes): {reason}; the file is damaged or cut short: write it or copy it again"
    )]
    Damaged {
        /// The redacted URL.
        file: String,
        /// Its length.
        file_bytes: u64,
        /// What the reader found.
        reason: String,
    },
    /// A row group of a file cannot be decoded.
    #[error(
        "{file}: row group {row_group}: cannot be decoded: {reason}; run `latents verify` on the data set and replace the file"
    )]
    RowGroup {
        /// The redacted URL.
        file: String,
        /// The row group in the file.
        row_group: usize,
        /// What the reader found.
        reason: String,
    },
    /// A row breaks the contract.
    #[error("{file}: row {row_in_file} (row group {row_group}): `{column}` is {found}; expected {expected}")]
    Row {
        /// The redacted URL.
        file: String,
        /// The row group in the file.
        row_group: usize,
        /// The row in the file, from 0.
        row_in_file: u64,
        /// The column.
        column: String,
        /// What the row holds.
        found: String,
        /// What it should hold.
        expected: String,
    },
    /// A column is not there.
    #[error("{file}: no column {wanted}; the file has: {}. Name the columns under `data.columns` in the config", .found.join(", "))]
    MissingColumn {
        /// The redacted URL.
        file: String,
        /// What was looked for.
        wanted: String,
        /// The columns of the file.
        found: Vec<String>,
    },
    /// A column has a type that cannot be read as what it is for.
    #[error("{file}: column `{column}` has type {found}; expected {expected}")]
    ColumnType {
        /// The redacted URL.
        file: String,
        /// The column.
        column: String,
        /// Its type.
        found: String,
        /// The types that work.
        expected: String,
    },
    /// A metadata key is absent, unreadable, or contradicts the columns.
    #[error("{file}: metadata key `{key}`: {reason}")]
    Metadata {
        /// The redacted URL.
        file: String,
        /// The key.
        key: String,
        /// What was found, what was expected.
        reason: String,
    },
    /// Two files of one data set differ in what they must share.
    #[error("{file}: {key} is {found}, but {first_file} has {expected}; all files of a data set must agree")]
    Disagreement {
        /// The redacted URL of the file that differs.
        file: String,
        /// The column or metadata key.
        key: String,
        /// Its value here.
        found: String,
        /// The redacted URL of the data set's first file.
        first_file: String,
        /// The value there.
        expected: String,
    },
    /// More rows are broken than may be replaced.
    #[error(
        "{rows} rows lie in broken row groups, but `data.skip_budget_rows` = {budget_rows}: {}; replace the files, or raise the budget",
        .evidence.join("; ")
    )]
    TooMuchDamage {
        /// Rows of all broken row groups.
        rows: u64,
        /// Most that were allowed.
        budget_rows: u64,
        /// Each row group and what is wrong with it.
        evidence: Vec<String>,
    },
    /// The schedule cannot be made.
    #[error("the rows cannot be dealt to lanes: {0}")]
    Schedule(String),
    /// The caller asked for rows that the data set does not have, or for something it cannot give.
    #[error("{url}: {reason}")]
    Request {
        /// The redacted URL.
        url: String,
        /// What was asked and what there is.
        reason: String,
    },
    /// A part file cannot be written.
    #[error("{file}: cannot be written: {reason}")]
    Write {
        /// The path.
        file: String,
        /// What happened.
        reason: String,
    },
    /// Something that is to be converted is not as it should be.
    #[error("{place}: {reason}")]
    Source {
        /// The file, with the entry or tensor in it.
        place: String,
        /// What was found, what was expected, what to do.
        reason: String,
    },
    /// A thread of this crate panicked: a defect, or a file that trips the parquet reader.
    #[error(
        "{place}: the reader panicked: {message}; if `latents verify` passes on this data set, please report it as a bug"
    )]
    Panicked {
        /// The file, or what the thread was doing.
        place: String,
        /// The panic's message.
        message: String,
    },
    /// `next()` was called after the last micro-batch.
    #[error("no micro-batch left: the stream ended before step {end_step}, as asked")]
    EndOfStream {
        /// The first step that was not asked for.
        end_step: u64,
    },
    /// `next()` was called again after it had returned an error.
    #[error("the stream of micro-batches has stopped after an earlier error")]
    Stopped,
    /// Several files are wrong; each is named.
    #[error("{} problems:\n{}", .0.len(), .0.iter().map(|e| format!("  {e}")).collect::<Vec<_>>().join("\n"))]
    Several(Vec<DataError>),
}

impl DataError {
    /// One error for all of `errors`; `Ok` if there are none.
    pub(crate) fn all(errors: Vec<DataError>) -> Result<(), DataError> {
        if errors.is_empty() { Ok(()) } else { Err(Self::some(errors)) }
    }

    /// One error for all of `errors`, at least one.
    pub(crate) fn some(errors: Vec<DataError>) -> DataError {
        let each = |error| match error {
            DataError::Several(errors) => errors,
            one => vec![one],
        };
        let mut errors: Vec<DataError> = errors.into_iter().flat_map(each).collect();
        if errors.len() == 1 { errors.remove(0) } else { DataError::Several(errors) }
    }

    /// Whether the data are damaged, as opposed to out of reach or asked for wrongly. Bytes that make the reader panic are.
    pub(crate) fn is_damage(&self) -> bool {
        matches!(self, Self::RowGroup { .. } | Self::Row { .. } | Self::Panicked { .. })
    }

    /// [`DataError::Source`].
    pub(crate) fn source(place: impl Into<String>, reason: impl Into<String>) -> DataError {
        DataError::Source { place: place.into(), reason: reason.into() }
    }

    /// The error of a caught panic.
    pub(crate) fn panicked(place: impl Into<String>, payload: &(dyn std::any::Any + Send)) -> DataError {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        DataError::Panicked { place: place.into(), message }
    }
}
