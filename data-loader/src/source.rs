//! From a URL to the parquet files behind it, and to bytes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use configs::location::{local_path, redact, resolve};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::ParquetError;
use parquet::file::metadata::{ParquetMetaData, ParquetMetaDataReader};
use stores::{RangeReader, ReadError};
use url::Url;

use crate::access::{Remote, into_parquet};
use crate::pattern::{self, AS_IN_A_SHELL, Wildcard, has_wildcards};
use crate::{DataError, OpenOptions};

/// Bytes from the end of a file that are fetched first: the footer of most files in one request.
const FOOTER_GUESS_BYTES: usize = 64 * 1024;

/// Names that are looked up at the same time.
const LOOK_UPS_AT_ONCE: usize = 16;

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
    /// Where it is on this machine.
    pub local: Option<LocalFile>,
}

/// A file of this machine as it was when it was found.
#[derive(Clone, Debug)]
pub(crate) struct LocalFile {
    pub path: PathBuf,
    pub bytes: u64,
    pub modified: SystemTime,
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

    /// The parquet files at the location: the file itself, or all below the folder, sorted by path; of a name with ranges or
    /// wildcards, those of one name after the other. What was not found is told by at least one error.
    pub async fn files(&self) -> Found {
        // A local file or folder of that very name is meant, whatever its name.
        if self.reader.is_none() && FsPath::new(&self.name).exists() {
            return Found::of(self.files_at(self.path.clone()).await);
        }
        let refuse = |reason: String| DataError::Location { url: self.name.clone(), reason };
        let names = match pattern::expand(self.path.as_ref()) {
            Ok(names) => names,
            Err(reason) => return Found::of(Err(refuse(reason))),
        };
        let found = futures::stream::iter(names).map(|name| async move {
            if has_wildcards(&name) {
                return self.matching(&name).await;
            }
            let path = Path::parse(&name).map_err(|error| refuse(error.to_string()))?;
            self.files_at(path).await
        });
        let mut all = Found::default();
        let mut found = found.buffered(LOOK_UPS_AT_ONCE);
        while let Some(found) = found.next().await {
            all.add(Found::of(found));
        }
        all
    }

    /// The files of a path without wildcards.
    async fn files_at(&self, path: Path) -> Result<Found, DataError> {
        let name = format!("{}{path}", self.prefix);
        let nothing = |what: &str| DataError::NoData { url: name.clone(), what: what.into() };
        let is_folder = if self.reader.is_none() {
            let about = std::fs::metadata(&name).map_err(|e| match e.kind() {
                std::io::ErrorKind::NotFound => nothing("no such file or folder"),
                _ => DataError::Location { url: name.clone(), reason: e.to_string() },
            })?;
            about.is_dir()
        } else {
            path.as_ref().is_empty()
        };
        if !is_folder {
            let found = match &self.reader {
                None => {
                    let failed = |source| DataError::Store { file: name.clone(), source };
                    Some(self.store.head(&path).await.map_err(failed)?)
                }
                Some(reader) => match reader.look_up(&path, &name).await {
                    Err(ReadError::Missing { .. }) if self.can_list => None,
                    found => Some(found?),
                },
            };
            if let Some(meta) = found {
                return Ok(Found { files: vec![self.file(meta)], errors: Vec::new() });
            }
        }
        let files = self.below(&path, |file| is_data_file(&path, file)).await?;
        complete(files, &name, |_| true)
    }

    /// The files that fit a path with wildcards.
    async fn matching(&self, path: &str) -> Result<Found, DataError> {
        let name = format!("{}{path}", self.prefix);
        let refuse = |reason: String| DataError::Location { url: name.clone(), reason };
        if !self.can_list {
            return Err(refuse(
                "a plain web server does not list its files, so `*` cannot be resolved; name them by a range such as part-{00000..00007}-of-00008.parquet, or by a list of URLs".into(),
            ));
        }
        let wildcard = Wildcard::new(path).map_err(refuse)?;
        if self.reader.is_some() {
            let folder = Path::parse(wildcard.folder()).map_err(|error| refuse(error.to_string()))?;
            let fits = |file: &Path| file.as_ref().ends_with(".parquet") && wildcard.fits(file.as_ref());
            return complete(self.below(&folder, fits).await?, &name, |missing| wildcard.fits(missing));
        }
        // On the disk only folders that fit are looked into.
        let found = glob::glob_with(&name, AS_IN_A_SHELL).map_err(|error| refuse(error.to_string()))?;
        let mut files = Vec::new();
        for path in found {
            let path = path.map_err(|error| refuse(error.to_string()))?;
            let at = Path::from_absolute_path(&path).map_err(|error| refuse(error.to_string()))?;
            if path.is_dir() {
                let is_data = |file: &Path| is_data_file(&at, file) && wildcard.fits(file.as_ref());
                files.extend(self.below(&at, is_data).await?);
            } else if at.as_ref().ends_with(".parquet") && wildcard.fits(at.as_ref()) {
                let failed = |source| DataError::Store { file: path.display().to_string(), source };
                files.push(self.file(self.store.head(&at).await.map_err(failed)?));
            }
        }
        complete(files, &name, |missing| wildcard.fits(missing))
    }

    /// The files below a folder that `is_data`.
    async fn below(&self, folder: &Path, is_data: impl Fn(&Path) -> bool) -> Result<Vec<SourceFile>, DataError> {
        let name = format!("{}{folder}", self.prefix);
        let listed: Vec<_> = match &self.reader {
            None => {
                let failed = |source| DataError::Store { file: name.clone(), source };
                self.store.list(Some(folder)).try_collect().await.map_err(failed)?
            }
            Some(reader) => reader.list(folder, &name).await?,
        };
        Ok(listed.into_iter().filter(|meta| is_data(&meta.location)).map(|meta| self.file(meta)).collect())
    }

    fn file(&self, meta: ObjectMeta) -> SourceFile {
        let name = format!("{}{}", self.prefix, meta.location);
        let remote = self.reader.as_ref().map(|reader| Remote::new(reader, &meta, &name));
        let path =
            if self.reader.is_none() { LocalFileSystem::new().path_to_filesystem(&meta.location).ok() } else { None };
        let local = path.map(|path| LocalFile { path, bytes: meta.size, modified: meta.last_modified.into() });
        SourceFile { store: self.store.clone(), path: meta.location, file_bytes: meta.size, remote, local, name }
    }
}

/// What a location leads to.
#[derive(Default)]
pub(crate) struct Found {
    pub files: Vec<SourceFile>,
    /// What should be there as well.
    pub errors: Vec<DataError>,
}

impl Found {
    fn of(found: Result<Found, DataError>) -> Self {
        found.unwrap_or_else(|error| Self { files: Vec::new(), errors: vec![error] })
    }

    /// Appends what another location leads to.
    pub fn add(&mut self, other: Found) {
        self.files.extend(other.files);
        self.errors.extend(other.errors);
    }
}

/// Sorts files, of which there must be one, by path; parts that are missing of a numbered set are an error if they `count`.
fn complete(mut files: Vec<SourceFile>, name: &str, counts: impl Fn(&str) -> bool) -> Result<Found, DataError> {
    if files.is_empty() {
        return Err(DataError::NoData { url: name.to_owned(), what: "no .parquet file found".into() });
    }
    files.sort_by(|a, b| a.path.as_ref().cmp(b.path.as_ref()));
    let missing: Vec<String> = missing_parts(files.iter().map(|file| file.path.as_ref()))
        .into_iter()
        .filter(|path| counts(path))
        .map(|path| path.rsplit('/').next().unwrap_or(&path).to_owned())
        .collect();
    let error = (!missing.is_empty()).then(|| DataError::MissingParts { folder: name.to_owned(), missing });
    Ok(Found { files, errors: error.into_iter().collect() })
}

/// The value of `key` in a path of the form `…/key=value/part.parquet`, as Hive and Spark lay data sets out.
pub(crate) fn partition(path: &Path, key: &str) -> Option<String> {
    let folders = path.as_ref().rsplit_once('/')?.0;
    let text = folders.split('/').rev().find_map(|folder| folder.strip_prefix(key)?.strip_prefix('='))?;
    Some(percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned())
}

/// A `.parquet` file whose path below the folder has no hidden part (`_temporary/`, `.cache/`).
fn is_data_file(folder: &Path, file: &Path) -> bool {
    let below = file.as_ref().strip_prefix(folder.as_ref()).unwrap_or(file.as_ref());
    file.as_ref().ends_with(".parquet") && !below.split('/').any(|part| part.starts_with(['.', '_']))
}

/// Paths that complete the sets of `<stem>-00003-of-00008.parquet`.
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
        let numbers: std::collections::HashSet<usize> = parts.iter().filter_map(|part| part.parse().ok()).collect();
        missing.extend(
            (0..count).filter(|n| !numbers.contains(n)).map(|n| format!("{stem}-{n:0width$}-of-{total}.parquet")),
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
        assert_eq!(missing_parts(some.into_iter()), ["d/part-00001-of-00003.parquet", "d/test-1-of-2.parquet"]);
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
