//! How a data set's files are reached: local ones directly, remote ones by requests that are tried again and may be cached.

use std::sync::Arc;

use object_store::ObjectMeta;
use object_store::ObjectStore;
use parquet::errors::ParquetError;
use stores::{BlockCache, Object, RangeReader, ReadError, ReadOptions};

use crate::{Columns, DataError};

/// How a data set is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// Names of the columns.
    pub columns: Columns,
    /// Where bytes of remote files are kept. Local files are never cached.
    pub cache: Option<Arc<BlockCache>>,
    /// How remote files are read.
    pub read: ReadOptions,
}

impl OpenOptions {
    /// Defaults, for column names.
    pub fn of(columns: &Columns) -> Self {
        Self { columns: columns.clone(), ..Self::default() }
    }

    /// A reader of a remote store.
    pub(crate) fn reader(&self, store: &Arc<dyn ObjectStore>) -> Arc<RangeReader> {
        Arc::new(RangeReader::new(store.clone(), self.read, self.cache.clone()))
    }
}

/// A remote file.
#[derive(Clone, Debug)]
pub(crate) struct Remote {
    pub reader: Arc<RangeReader>,
    pub object: Arc<Object>,
}

impl Remote {
    pub fn new(reader: &Arc<RangeReader>, meta: &ObjectMeta, name: &str) -> Self {
        Self { reader: reader.clone(), object: Arc::new(Object::new(meta, name)) }
    }
}

/// A reader's error on its way through the parquet reader.
pub(crate) fn into_parquet(error: ReadError) -> ParquetError {
    ParquetError::External(Box::new(error))
}

/// The error of a store or its reader that came through the parquet reader, or what `otherwise` makes of the parquet
/// reader's own words about `file`.
pub(crate) fn out_of_parquet(
    error: ParquetError,
    file: &str,
    otherwise: impl FnOnce(String) -> DataError,
) -> DataError {
    match error {
        ParquetError::External(source) => match source.downcast::<ReadError>() {
            Ok(error) => DataError::Remote(*error),
            Err(source) => match source.downcast::<object_store::Error>() {
                Ok(source) => DataError::Store { file: file.to_owned(), source: *source },
                Err(source) => otherwise(source.to_string()),
            },
        },
        error => otherwise(error.to_string()),
    }
}
