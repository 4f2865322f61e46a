//! Small data sets with numbers that tell where they come from. For tests.
#![allow(clippy::unwrap_used)]

use std::fmt;
use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetRange, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use stores::ReadOptions;

use crate::{LatentDataset, LatentRow, LatentWriter, OpenOptions, Row, WriterOptions};

/// A row as written: mean, log-variance, and the same of the mirrored image where stored.
pub struct Sample {
    pub latents: Vec<Vec<f32>>,
    pub label: i64,
    pub id: String,
}

impl Sample {
    pub fn row(&self) -> LatentRow<'_> {
        LatentRow {
            mean: &self.latents[0],
            logvar: &self.latents[1],
            flipped: self.latents.get(2).map(|mean| (&mean[..], &self.latents[3][..])),
            label: self.label,
            id: &self.id,
        }
    }
}

/// Sample `row`: every number is exact in f16 and tells its row, column and position.
pub fn sample(row: usize, options: &WriterOptions) -> Sample {
    let numel: usize = options.latent_shape.iter().product();
    let columns = if options.flipped { 4 } else { 2 };
    let latent =
        |column: usize| (0..numel).map(|i| ((row * 7 + column * 501 + i) % 2001) as f32 / 64.0 - 15.0).collect();
    Sample { latents: (0..columns).map(latent).collect(), label: (row % 10) as i64, id: format!("id-{row}") }
}

pub fn samples(rows: usize, options: &WriterOptions) -> Vec<Sample> {
    (0..rows).map(|row| sample(row, options)).collect()
}

pub fn write(path: &FsPath, options: WriterOptions, samples: &[Sample]) {
    let means_only = if options.moments { 1 } else { 2 };
    let mut writer = LatentWriter::create(path, options.clone()).unwrap();
    for Sample { latents, label, id } in samples {
        // Without moments only the means.
        let latents: Vec<&[f32]> = latents.iter().step_by(means_only).map(Vec::as_slice).collect();
        writer.push_row(Row { latents: &latents, shape: None, label: options.labels.then_some(*label), id }).unwrap();
    }
    writer.finish().unwrap();
}

/// What a [`FaultyStore`] does with requests for data.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Mode {
    Serve = 0,
    Fail = 1,
    Panic = 2,
    Hang = 3,
}

/// A store in memory that can be told to misbehave.
#[derive(Debug, Default)]
pub struct FaultyStore {
    inner: InMemory,
    pub mode: AtomicU8,
    /// Requests that hang.
    pub hanging: AtomicUsize,
    /// What was asked for by ranges: object and bytes.
    requested: Mutex<Vec<(Path, Range<u64>)>>,
}

impl FaultyStore {
    /// A store with 150 rows at `set/`, opened.
    pub fn dataset() -> (Arc<Self>, Arc<LatentDataset>) {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions { row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 2]) };
        let path = folder.path().join("a.parquet");
        write(&path, options.clone(), &samples(150, &options));
        let store = Arc::new(Self::default());
        store.put_bytes("set/a.parquet", std::fs::read(&path).unwrap());
        let read = ReadOptions { tries: 2, pause: Duration::from_millis(1), ..ReadOptions::default() };
        let options = OpenOptions { read, ..OpenOptions::default() };
        let dataset = LatentDataset::open_in_with(store.clone(), Path::from("set"), &options).unwrap();
        (store, Arc::new(dataset))
    }

    pub fn put_bytes(&self, path: &str, bytes: Vec<u8>) {
        futures::executor::block_on(self.inner.put(&Path::from(path), bytes.into())).unwrap();
    }

    /// What was asked for since the last call.
    pub fn take_requests(&self) -> Vec<(Path, Range<u64>)> {
        std::mem::take(&mut *self.requested.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn record(&self, location: &Path, ranges: impl IntoIterator<Item = Range<u64>>) {
        let mut requested = self.requested.lock().unwrap_or_else(PoisonError::into_inner);
        requested.extend(ranges.into_iter().map(|range| (location.clone(), range)));
    }

    async fn misbehave(&self) -> Result<()> {
        match self.mode.load(Ordering::SeqCst) {
            mode if mode == Mode::Serve as u8 => Ok(()),
            mode if mode == Mode::Fail as u8 => {
                Err(object_store::Error::Generic { store: "test", source: "injected failure".into() })
            }
            mode if mode == Mode::Panic as u8 => panic!("injected panic"),
            _ => {
                self.hanging.fetch_add(1, Ordering::SeqCst);
                futures::future::pending().await
            }
        }
    }
}

impl fmt::Display for FaultyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty store")
    }
}

#[async_trait::async_trait]
impl ObjectStore for FaultyStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.misbehave().await?;
        match &options.range {
            Some(GetRange::Bounded(range)) => self.record(location, std::iter::once(range.clone())),
            None if options.head => {}
            _ => self.record(location, std::iter::once(0..u64::MAX)),
        }
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.misbehave().await?;
        self.record(location, ranges.iter().cloned());
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
