//! From a URL to the parquet files behind it, and to bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::Arc;

use bytes::Bytes;
use configs::location::{local_path, redact, resolve};
use futures::future::BoxFuture;
use futures::{FutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use stores::{RangeReader, ReadError};
use url::Url;

use crate::access::{Remote, into_parquet};
use crate::{DataError, OpenOptions};

/// Bytes from the end of a file that are fetched first: the footer of most files in one request.
const FOOTER_GUESS_BYTES: usize = 64 * 1024;

/// One parquet file of a store.
#[derive(Clone, Debug)]
pub(crate) struct SourceFile {
    pub store: Arc<dyn ObjectStore>,
    pub path: Path,
    pub file_bytes: u64,
    /// How it is read, unless it is local.
    pub remote: Option<Remote>,
    /// For messages: the local path, or the redacted URL.
    pub name: String,
}

/// Where a data set is.
pub(crate) struct Location {
    store: Arc<dyn ObjectStore>,
    path: Path,
    /// The URL for messages.
    pub name: String,
    /// What goes in front of a path in the store to name a file.
    prefix: String,
    /// Reads from the store, unless it is local.
    reader: Option<Arc<RangeReader>>,
    /// Plain web servers cannot list.
    can_list: bool,
}

impl Location {
    /// Makes the store of a URL or path; no request is made. Credentials come from where [`stores`] takes them.
    pub fn parse(text: &str, options: &OpenOptions) -> Result<Self, DataError> {
        let url_text = resolve(FsPath::new(""), text);
        let name = redact(&url_text);
        let refuse = |reason: String| DataError::Location { url: name.clone(), reason };
        let url = Url::parse(&url_text).map_err(|e| refuse(e.to_string()))?;
        let local = url.scheme() == "file";
        let (store, path) = stores::open(&url, stores::Bounds::default()).map_err(|error| {
            refuse(match error {
                stores::StoreError::Url { reason, .. } => reason,
                of_file => of_file.to_string(),
            })
        })?;
        let prefix = if local { "/".to_owned() } else { redact(&format!("{}/", &url[..url::Position::BeforePath])) };
        let name = if local { local_path(&url_text).map_or(name, |path| path.display().to_string()) } else { name };
        let can_list = !matches!(url.scheme(), "http" | "https");
        let reader = (!local).then(|| options.reader(&store));
        Ok(Self { store, path, name, prefix, reader, can_list })
    }

    /// A location in a store that the caller already has.
    pub fn in_store(store: Arc<dyn ObjectStore>, path: Path, options: &OpenOptions) -> Self {
        let reader = Some(options.reader(&store));
        Self { store, name: path.to_string(), path, prefix: String::new(), reader, can_list: true }
    }

    /// The parquet files at the location: the file itself, or all below the folder, sorted by path; and an error if they are
    /// numbered and parts are missing.
    pub async fn files(&self) -> Result<(Vec<SourceFile>, Option<DataError>), DataError> {
        let failed = |source| DataError::Store { file: self.name.clone(), source };
        let nothing = |what: &str| DataError::NoData { url: self.name.clone(), what: what.into() };
        let is_folder = if self.reader.is_none() {
            let about = std::fs::metadata(&self.name).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => nothing("no such file or folder"),
                _ => DataError::Location { url: self.name.clone(), reason: e.to_string() },
            })?;
            about.is_dir()
        } else {
            self.path.as_ref().is_empty()
        };
        if !is_folder {
            let found = match &self.reader {
                None => Some(self.store.head(&self.path).await.map_err(failed)?),
                Some(reader) => match reader.look_up(&self.path, &self.name).await {
                    Err(ReadError::Missing { .. }) if self.can_list => None,
                    found => Some(found?),
                },
            };
            if let Some(meta) = found {
                return Ok((vec![self.file(meta)], None));
            }
        }
        let listed: Vec<_> = match &self.reader {
            None => self.store.list(Some(&self.path)).try_collect().await.map_err(failed)?,
            Some(reader) => reader.list(&self.path, &self.name).await?,
        };
        let mut files: Vec<SourceFile> = listed
            .into_iter()
            .filter(|meta| is_data_file(&self.path, &meta.location))
            .map(|meta| self.file(meta))
            .collect();
        if files.is_empty() {
            return Err(nothing("no .parquet file found"));
        }
        files.sort_by(|a, b| a.path.as_ref().cmp(b.path.as_ref()));
        let missing = missing_parts(files.iter().map(|file| file.path.as_ref()));
        let error = (!missing.is_empty()).then(|| DataError::MissingParts { folder: self.name.clone(), missing });
        Ok((files, error))
    }

    fn file(&self, meta: ObjectMeta) -> SourceFile {
        let name = format!("{}{}", self.prefix, meta.location);
        let remote = self.reader.as_ref().map(|reader| Remote::new(reader, &meta, &name));
        SourceFile { store: self.store.clone(), path: meta.location, file_bytes: meta.size, remote, name }
    }
}

/// A `.parquet` file whose path below the folder has no hidden part (`_temporary/`, `.cache/`).
fn is_data_file(folder: &Path, file: &Path) -> bool {
    let below = file.as_ref().strip_prefix(folder.as_ref()).unwrap_or(file.as_ref());
    file.as_ref().ends_with(".parquet") && !below.split('/').any(|part| part.starts_with(['.', '_']))
}

/// Names that complete the sets of `<stem>-00003-of-00008.parquet`.
fn missing_parts<'a>(paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    /// More parts than this are taken for a name that only looks like one.
    const MOST_PARTS: usize = 1_000_000;
    let mut sets: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
    for path in paths {
        let Some((front, total)) = path.strip_suffix(".parquet").and_then(|stem| stem.rsplit_once("-of-")) else {
            continue;
        };
        let Some((stem, part)) = front.rsplit_once('-') else {
            continue;
        };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if digits(part) && digits(total) {
            sets.entry((stem, total)).or_default().push(part);
        }
    }
    let mut missing = Vec::new();
    for ((stem, total), parts) in sets {
        let Ok(count) = total.parse::<usize>() else {
            continue;
        };
        if count > MOST_PARTS {
            continue;
        }
        let width = parts[0].len();
        let name = stem.rsplit('/').next().unwrap_or(stem);
        let numbers: std::collections::HashSet<usize> = parts.iter().filter_map(|part| part.parse().ok()).collect();
        missing.extend(
            (0..count).filter(|n| !numbers.contains(n)).map(|n| format!("{name}-{n:0width$}-of-{total}.parquet")),
        );
    }
    missing
}

/// Feeds the parquet reader from a store, by ranges.
pub(crate) struct ObjectReader(pub SourceFile);

impl AsyncFileReader for ObjectReader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, parquet::errors::Result<Bytes>> {
        let one = self.get_byte_ranges(vec![range]);
        async move { Ok(one.await?.swap_remove(0)) }.boxed()
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, parquet::errors::Result<Vec<Bytes>>> {
        async move {
            match &self.0.remote {
                None => self.0.store.get_ranges(&self.0.path, &ranges).await.map_err(ParquetError::from),
                Some(Remote { reader, object }) => reader.read(object, &ranges).await.map_err(into_parquet),
            }
        }
        .boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, parquet::errors::Result<Arc<ParquetMetaData>>> {
        async move {
            let file_bytes = self.0.file_bytes;
            let reader = ParquetMetaDataReader::new()
                .with_arrow_reader_options(options)
                .with_prefetch_hint(Some(FOOTER_GUESS_BYTES));
            Ok(Arc::new(reader.load_and_finish(self, file_bytes).await?))
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_must_be_complete_per_set() {
        assert!(
            missing_parts(["a/b.parquet", "a/x-0-of-1.parquet", "train-of-2.parquet", "y-z-of-q.parquet"].into_iter())
                .is_empty()
        );
        let some = ["d/part-00000-of-00003.parquet", "d/part-00002-of-00003.parquet", "d/test-0-of-2.parquet"];
        assert_eq!(missing_parts(some.into_iter()), ["part-00001-of-00003.parquet", "test-1-of-2.parquet"]);
    }

    #[test]
    fn hidden_folders_and_other_files_are_no_data() {
        let folder = Path::from("_data/set");
        for (path, is_data) in [
            ("_data/set/a.parquet", true),
            ("_data/set/k=1/a.parquet", true),
            ("_data/set/_tmp/a.parquet", false),
            ("_data/set/a.txt", false),
        ] {
            assert_eq!(is_data_file(&folder, &Path::from(path)), is_data, "{path}");
        }
    }
}
