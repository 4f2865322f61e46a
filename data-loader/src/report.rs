//! What is in a data set (`latents inspect`) and whether it can be trusted (`latents verify`).

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::{DataError, LatentDataset, RowGroup, Shapes};

/// Mean and standard deviation of one channel over all rows and positions, unscaled.
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
    /// SHA-256 over all latents in row order as little-endian f32.
    pub sha256_f32: String,
}

/// Reads a whole data set and tells what it holds. Memory: one row group.
///
/// # Errors
/// If a row group cannot be read.
pub fn inspect(dataset: &LatentDataset) -> Result<Inspection, DataError> {
    let meta = dataset.meta();
    let shapes = dataset.row_shapes()?;
    let channels = shapes.shapes().iter().map(|shape| shape[0]).min().unwrap_or(0);
    let (mut sums, mut squares) = (vec![0f64; channels], vec![0f64; channels]);
    let mut count = 0u64;
    let mut rows_of_shape = vec![0u64; shapes.shapes().len()];
    let mut labels = BTreeMap::new();
    let mut digest = Sha256::new();
    let (mut latent, mut bytes) = (Vec::new(), Vec::new());
    for group in dataset.row_groups() {
        let block = dataset.read_row_group(group)?;
        for row in 0..block.len() {
            latent.resize(block.latent_numel(row), 0f32);
            block.latent(0, row, &mut latent);
            let per_channel = latent.len() / block.latent_shape(row)[0];
            count += per_channel as u64;
            rows_of_shape[shapes.index(block.rows()[row])] += 1;
            bytes.clear();
            bytes.extend(latent.iter().flat_map(|number| number.to_le_bytes()));
            digest.update(&bytes);
            for (channel, numbers) in latent.chunks_exact(per_channel).take(channels).enumerate() {
                for &number in numbers {
                    sums[channel] += f64::from(number);
                    squares[channel] += f64::from(number) * f64::from(number);
                }
            }
            *labels.entry(block.labels()[row]).or_insert(0) += 1;
        }
    }
    let count = count as f64;
    let stats = |(sum, square): (&f64, &f64)| {
        let mean = sum / count;
        ChannelStats { mean, std: (square / count - mean * mean).max(0.0).sqrt() }
    };
    Ok(Inspection {
        url: dataset.name().to_owned(),
        rows: meta.rows,
        files: meta.files,
        row_groups: meta.row_groups,
        latent_shape: meta.latent_shape.clone(),
        shapes: match meta.shapes {
            Shapes::Same => Vec::new(),
            Shapes::Variable(_) => {
                let counted = shapes.shapes().iter().zip(rows_of_shape);
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
        labels,
        channels: sums.iter().zip(&squares).map(stats).collect(),
        sha256_f32: digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect(),
    })
}

/// Decodes every page of the latent, label and id columns, and returns each problem in words that name file and row.
///
/// Of rows with null or wrong length, the first of a row group is named, and the rest of that group is not looked at.
pub fn verify(dataset: &LatentDataset) -> Vec<String> {
    let mut problems = Vec::new();
    let mut ids = HashMap::new();
    for group in dataset.row_groups() {
        if let Err(error) = verify_row_group(dataset, group, &mut ids, &mut problems) {
            problems.push(error.to_string());
        }
    }
    problems
}

fn verify_row_group(
    dataset: &LatentDataset,
    group: &RowGroup,
    ids: &mut HashMap<String, u64>,
    problems: &mut Vec<String>,
) -> Result<(), DataError> {
    let block = dataset.read_row_group(group)?;
    let mut latent = Vec::new();
    for (index, &row) in block.rows().iter().enumerate() {
        latent.resize(block.latent_numel(index), 0f32);
        for column in 0..block.latent_columns() {
            block.latent(column, index, &mut latent);
            if let Some(at) = latent.iter().position(|number| !number.is_finite()) {
                let found = format!("{} at position {at}", latent[at]);
                problems.push(
                    dataset.row_error(row, dataset.latent_column(column), found, "finite numbers".into()).to_string(),
                );
            }
        }
        let label = block.labels()[index];
        if let Some(error) = dataset.meta().num_classes.and_then(|classes| dataset.label_error(row, label, classes)) {
            problems.push(error.to_string());
        }
        if let Some(id) = block.ids.get(index)
            && let Some(first) = ids.insert(id.clone(), row)
        {
            let expected = format!("an id that no other row has; row {first} of the data set has it too");
            problems.push(dataset.row_error(row, &dataset.columns().id, format!("`{id}`"), expected).to_string());
        }
    }
    Ok(())
}
