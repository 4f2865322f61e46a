//! `latents inspect`: what a data set holds.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::captions::{CaptionSummary, CaptionTally};
use super::in_order::in_order;
use super::{Layout, Progress, ReadSpeed};
use crate::{DataError, LatentDataset, RowBlock, RowRun, Shapes};

/// Row groups that are decoded at a time.
const THREADS: usize = 2;

/// How much is looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct InspectOptions {
    /// Only footers and a sample of the rows.
    pub quick: bool,
}

/// Mean and standard deviation of one channel over all rows and positions, unscaled; of the finite numbers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ChannelStats {
    /// The mean.
    pub mean: f64,
    /// The standard deviation.
    pub std: f64,
}

/// A shape and how many rows have it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ShapeCount {
    /// The shape.
    pub shape: Vec<usize>,
    /// Its rows.
    pub rows: u64,
}

/// What a data set holds. Latents are the stored ones, or the posterior means.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The location, without secrets.
    pub url: String,
    /// Rows of all files.
    pub rows: u64,
    /// Rows that `labels`, `channels`, `captions` and `non_finite` tell of: all, or a sample.
    pub rows_read: u64,
    /// Parquet files.
    pub files: usize,
    /// Row groups of all files.
    pub row_groups: usize,
    /// Shape of one latent; empty where rows have shapes of their own.
    pub latent_shape: Vec<usize>,
    /// How many rows have each shape, where rows have shapes of their own.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shapes: Vec<ShapeCount>,
    /// Stored number type.
    pub dtype: String,
    /// Whether posterior moments are stored.
    pub moments: bool,
    /// Whether mirrored latents are stored.
    pub flipped: bool,
    /// Bytes of all latent numbers of one row.
    pub row_bytes: usize,
    /// From the metadata.
    pub num_classes: Option<usize>,
    /// From the metadata.
    pub scaling_factor: Option<f64>,
    /// From the metadata.
    pub vae_digest: Option<String>,
    /// How many rows each label has.
    pub labels: BTreeMap<i64, u64>,
    /// Per channel (first dimension of the shape); of as many channels as every row has.
    pub channels: Vec<ChannelStats>,
    /// Numbers that are NaN or infinite.
    pub non_finite: u64,
    /// The captions, where rows have them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub captions: Option<CaptionSummary>,
    /// SHA-256 over all latents in row order as little-endian f32; absent if not all rows were read.
    pub sha256_f32: Option<String>,
    /// Columns, row groups, pages.
    pub layout: Layout,
    /// How fast a sample was read: one thread, ranges of rows from all over the data set.
    pub speed: ReadSpeed,
}

/// Tells what a data set holds. Memory: a few row groups.
///
/// # Errors
/// If a row group cannot be read.
pub fn inspect_with(
    dataset: &LatentDataset,
    options: InspectOptions,
    progress: Progress<'_>,
) -> Result<Inspection, DataError> {
    let meta = dataset.meta();
    let shapes = dataset.row_shapes()?;
    let channels = shapes.shapes().iter().map(|shape| shape[0]).min().unwrap_or(0);
    let (sample, speed) = dataset.timed_sample()?;
    let mut tally = Tally::new(channels);
    let mut captions = CaptionTally::default();
    let of_captions = |run: RowRun| match &meta.captions {
        Some(_) => dataset.read_captions(&[run]).map(|block| CaptionTally::of(&block)),
        None => Ok(CaptionTally::default()),
    };
    let mut digest = None;
    if options.quick {
        sample.iter().for_each(|block| tally.add(&Tally::of(block, channels)));
        for run in dataset.sample_runs() {
            captions.join(&of_captions(run)?);
        }
    } else {
        drop(sample);
        let mut hash = Sha256::new();
        let mut outcome = Ok(());
        let groups = dataset.row_groups();
        let read = |at: usize| {
            let block = dataset.read_row_group(&groups[at])?;
            let captions = of_captions(RowRun { first_row: groups[at].first_row, rows: groups[at].rows })?;
            Ok((Tally::of(&block, channels), captions, block))
        };
        in_order(groups.len(), THREADS, read, |_, result: Result<_, DataError>| match result {
            Ok((of_group, of_captions, block)) => {
                tally.add(&of_group);
                captions.join(&of_captions);
                hash_latents(&block, &mut hash);
                progress(tally.rows);
                ControlFlow::Continue(())
            }
            Err(error) => {
                outcome = Err(error);
                ControlFlow::Break(())
            }
        });
        outcome?;
        digest = Some(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
    }
    Ok(Inspection {
        url: dataset.name().to_owned(),
        rows: meta.rows,
        rows_read: tally.rows,
        files: meta.files,
        row_groups: meta.row_groups,
        latent_shape: meta.latent_shape.clone(),
        shapes: match meta.shapes {
            Shapes::Same => Vec::new(),
            Shapes::Variable(_) => {
                let mut rows_of = vec![0u64; shapes.shapes().len()];
                (0..meta.rows).for_each(|row| rows_of[shapes.index(row)] += 1);
                let counted = shapes.shapes().iter().zip(rows_of);
                counted.map(|(shape, rows)| ShapeCount { shape: shape.clone(), rows }).collect()
            }
        },
        dtype: meta.dtype.to_string(),
        moments: meta.moments,
        flipped: meta.flipped,
        row_bytes: meta.row_bytes,
        num_classes: meta.num_classes,
        scaling_factor: meta.scaling_factor,
        vae_digest: meta.vae_digest.clone(),
        channels: tally.channel_stats(),
        non_finite: tally.non_finite,
        labels: tally.labels,
        captions: captions.summary(dataset),
        sha256_f32: digest,
        layout: Layout::of(dataset),
        speed,
    })
}

/// All of a data set: [`inspect_with`] the default options.
///
/// # Errors
/// As [`inspect_with`].
pub fn inspect(dataset: &LatentDataset) -> Result<Inspection, DataError> {
    inspect_with(dataset, InspectOptions::default(), &mut |_| ())
}

/// What is counted over rows.
struct Tally {
    rows: u64,
    labels: BTreeMap<i64, u64>,
    non_finite: u64,
    /// Per channel: finite numbers, their sum and the sum of their squares.
    sums: Vec<(u64, f64, f64)>,
}

impl Tally {
    fn new(channels: usize) -> Self {
        Self { rows: 0, labels: BTreeMap::new(), non_finite: 0, sums: vec![(0, 0.0, 0.0); channels] }
    }

    fn of(block: &RowBlock, channels: usize) -> Self {
        let mut tally = Self::new(channels);
        tally.rows = block.len() as u64;
        let mut latent = Vec::new();
        for row in 0..block.len() {
            latent.resize(block.latent_numel(row), 0f32);
            block.latent(0, row, &mut latent);
            let per_channel = latent.len() / block.latent_shape(row)[0];
            for (numbers, (count, sum, squares)) in latent.chunks_exact(per_channel).zip(&mut tally.sums) {
                for number in numbers.iter().filter(|number| number.is_finite()) {
                    let number = f64::from(*number);
                    *count += 1;
                    *sum += number;
                    *squares += number * number;
                }
            }
            tally.non_finite += latent.iter().filter(|number| !number.is_finite()).count() as u64;
            if let Some(label) = block.labels().get(row) {
                *tally.labels.entry(*label).or_insert(0) += 1;
            }
        }
        tally
    }

    fn add(&mut self, other: &Self) {
        self.rows += other.rows;
        self.non_finite += other.non_finite;
        other.labels.iter().for_each(|(label, rows)| *self.labels.entry(*label).or_insert(0) += rows);
        for (own, other) in self.sums.iter_mut().zip(&other.sums) {
            *own = (own.0 + other.0, own.1 + other.1, own.2 + other.2);
        }
    }

    fn channel_stats(&self) -> Vec<ChannelStats> {
        let stats = |&(count, sum, squares): &(u64, f64, f64)| {
            let mean = sum / count as f64;
            ChannelStats { mean, std: (squares / count as f64 - mean * mean).max(0.0).sqrt() }
        };
        self.sums.iter().map(stats).collect()
    }
}

fn hash_latents(block: &RowBlock, hash: &mut Sha256) {
    let (mut latent, mut bytes) = (Vec::new(), Vec::new());
    for row in 0..block.len() {
        latent.resize(block.latent_numel(row), 0f32);
        block.latent(0, row, &mut latent);
        bytes.resize(latent.len() * 4, 0);
        for (bytes, number) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(&latent) {
            *bytes = number.to_le_bytes();
        }
        hash.update(&bytes);
    }
}
