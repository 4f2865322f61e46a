//! Small data sets with numbers that tell where they come from. For tests.
#![allow(clippy::unwrap_used)]

use std::ops::Range;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, Result};
use stores::ReadOptions;
use stores::testing::{Tamper, Tampered};

use crate::{Caption, CaptionMeta, LatentDataset, LatentRow, LatentWriter, OpenOptions, Row, WriterOptions};

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

/// The captions of row `row`, and their masks where there are any: numbers that tell row and caption, lengths that differ.
pub fn captions(row: usize, meta: &CaptionMeta) -> Vec<(Vec<f32>, Vec<bool>)> {
    let count = meta.per_row.unwrap_or(1 + row % 3);
    let caption = |which: usize| {
        let tokens = 1 + (row + which) % meta.most_tokens.unwrap_or(4);
        let numbers = (0..tokens * meta.dim).map(|i| ((row * 5 + which * 17 + i) % 256) as f32 / 2.0 - 50.0);
        (numbers.collect(), (0..tokens).map(|token| !meta.masked || token != 1).collect())
    };
    (0..count).map(caption).collect()
}

pub fn write(path: &FsPath, options: WriterOptions, samples: &[Sample]) {
    let means_only = if options.moments { 1 } else { 2 };
    let mut writer = LatentWriter::create(path, options.clone()).unwrap();
    for (row, Sample { latents, label, id }) in samples.iter().enumerate() {
        // Without moments only the means.
        let latents: Vec<&[f32]> = latents.iter().step_by(means_only).map(Vec::as_slice).collect();
        let stored = options.captions.map_or_else(Vec::new, |meta| captions(row, &meta));
        let of_row: Vec<Caption<'_>> = stored
            .iter()
            .map(|(embeddings, mask)| Caption {
                embeddings,
                mask: options.captions.filter(|meta| meta.masked).map(|_| &mask[..]),
            })
            .collect();
        let label = options.labels.then_some(*label);
        writer.push_row(Row { latents: &latents, shape: None, captions: &of_row, label, id }).unwrap();
    }
    writer.finish().unwrap();
}

/// What [`Faulty`] does with requests for data.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Mode {
    Serve = 0,
    Fail = 1,
    Panic = 2,
    Hang = 3,
}

/// Misbehaves when it is told to.
#[derive(Debug, Default)]
pub struct Faulty {
    pub mode: AtomicU8,
    /// Requests that hang.
    pub hanging: AtomicUsize,
    /// What was asked for: object and bytes.
    requested: Mutex<Vec<(Path, Range<u64>)>>,
}

/// A store with 150 rows at `set/`, opened.
pub fn faulty_dataset() -> (Arc<Tampered<Faulty>>, Arc<LatentDataset>) {
    let folder = tempfile::tempdir().unwrap();
    let options = WriterOptions { row_group_rows: 40, ..WriterOptions::new(vec![1, 2, 2]) };
    let path = folder.path().join("a.parquet");
    write(&path, options.clone(), &samples(150, &options));
    let store = Arc::new(Tampered::<Faulty>::default());
    put_bytes(&store.inner, "set/a.parquet", std::fs::read(&path).unwrap());
    let read = ReadOptions { tries: 2, pause: Duration::from_millis(1), ..ReadOptions::default() };
    let options = OpenOptions { read, ..OpenOptions::default() };
    let dataset = LatentDataset::open_in_with(store.clone(), Path::from("set"), &options).unwrap();
    (store, Arc::new(dataset))
}

pub fn put_bytes(store: &InMemory, path: &str, bytes: Vec<u8>) {
    futures::executor::block_on(store.put(&Path::from(path), bytes.into())).unwrap();
}

impl Faulty {
    /// What was asked for since the last call.
    pub fn take_requests(&self) -> Vec<(Path, Range<u64>)> {
        std::mem::take(&mut *self.requested.lock().unwrap_or_else(PoisonError::into_inner))
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

#[async_trait::async_trait]
impl Tamper for Faulty {
    async fn get(&self, inner: &InMemory, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.misbehave().await?;
        if !options.head {
            let range = match &options.range {
                Some(GetRange::Bounded(range)) => range.clone(),
                _ => 0..u64::MAX,
            };
            let mut requested = self.requested.lock().unwrap_or_else(PoisonError::into_inner);
            requested.push((path.clone(), range));
        }
        inner.get_opts(path, options).await
    }
}
