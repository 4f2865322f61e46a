//! fast-DiT's folders: `imagenet256_features/0.npy` of float32 `[1, C, H, W]`, already multiplied by the scaling factor, and
//! `imagenet256_labels/0.npy` of int64 `[1]`.

use std::ops::Range;
use std::path::Path;

use super::array::Array;
use super::files::{Listing, Place};
use super::sink::{Part, Sink, SinkRow, write_file};
use super::{About, Sample, Source, SourceFormat, npy};
use crate::{DataError, Dtype};

pub(super) const FEATURES: &str = "_features";
pub(super) const LABELS: &str = "_labels";
/// Names of the samples that fast-DiT itself does not know: one JSON text a line.
const IDS: &str = "ids.jsonl";
/// A sample of 2^28 numbers in f64, and its header.
const MOST_BYTES: u64 = (1 << 31) + (1 << 16);
const MOST_LABEL_BYTES: u64 = 1 << 20;

/// The two folders.
pub(super) struct FastDit {
    features: Place,
    labels: Place,
    /// File names, in the order of the numbers that they are.
    files: Vec<Box<str>>,
    /// The samples' own names, where we have written them.
    ids: Option<Vec<String>>,
    about: About,
}

impl FastDit {
    /// Opens the folder that holds the two folders, or the one with the features.
    ///
    /// # Errors
    /// If one of them, or a label, is missing.
    pub fn open(place: &Place) -> Result<Self, DataError> {
        let (parent, features) = match place.file_name() {
            name if name.ends_with(FEATURES) => (place.parent(), name),
            _ => {
                let Listing { folders, .. } = place.list()?;
                let mut found: Vec<String> = folders.into_iter().filter(|name| name.ends_with(FEATURES)).collect();
                if found.len() != 1 {
                    let reason = format!(
                        "holds {} folders …{FEATURES} ({}); expected one, as fast-DiT's extract_features.py writes it, or the path of one",
                        found.len(),
                        found.join(", ")
                    );
                    return Err(DataError::source(place.name(), reason));
                }
                (place.clone(), found.remove(0))
            }
        };
        let stem = features.strip_suffix(FEATURES).unwrap_or(&features);
        let (features, labels) = (parent.join(&features), parent.join(&format!("{stem}{LABELS}")));
        let files = npy_files(&features)?;
        if files.is_empty() {
            return Err(DataError::source(features.name(), "holds no .npy file"));
        }
        let labelled = npy_files(&labels)?;
        if let Some(difference) = first_difference(&files, &labelled) {
            return Err(match difference {
                Missing::Second(name) => DataError::source(
                    labels.join(name).name(),
                    format!("is missing: {} has no label", features.join(name).name()),
                ),
                Missing::First(name) => DataError::source(
                    features.join(name).name(),
                    format!("is missing, but its label {} is there", labels.join(name).name()),
                ),
            });
        }
        let ids = read_ids(&parent.join(IDS), files.len())?;
        let first = read_features(&features.join(&files[0]))?;
        let about = About {
            name: parent.name(),
            format: SourceFormat::FastDit,
            latent_shape: first.shape,
            row_shapes: false,
            moments: false,
            flipped: false,
            captions: None,
            labels: true,
            dtype: first.element.dtype().unwrap_or(Dtype::F32),
            scaling_factor: Some(1.0),
            num_classes: None,
            vae_digest: None,
            channel_stats: None,
            sequential: false,
        };
        Ok(Self { features, labels, files, ids, about })
    }

    fn id(&self, row: usize) -> String {
        match &self.ids {
            Some(ids) => ids[row].clone(),
            None => self.files[row].trim_end_matches(".npy").to_owned(),
        }
    }
}

impl Source for FastDit {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.files.len()
    }

    fn place(&self, row: usize) -> String {
        self.features.join(&self.files[row]).name()
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        let read = |name: &str| {
            let place = self.labels.join(name);
            let labels = npy::integers(&place.read(MOST_LABEL_BYTES)?)
                .map_err(|reason| DataError::source(place.name(), reason))?;
            match labels[..] {
                [label] => Ok(label),
                _ => Err(DataError::source(place.name(), format!("holds {} labels; expected 1", labels.len()))),
            }
        };
        self.files[rows].iter().map(|name| read(name)).collect()
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        Ok(rows.map(|row| self.id(row)).collect())
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        rows.iter()
            .map(|&row| {
                let latent = read_features(&self.features.join(&self.files[row]))?;
                Ok(Sample { latents: vec![latent], captions: Vec::new(), id: self.id(row) })
            })
            .collect()
    }
}

fn read_features(place: &Place) -> Result<Array, DataError> {
    let array = npy::array(&place.read(MOST_BYTES)?).map_err(|reason| DataError::source(place.name(), reason))?;
    if array.shape.len() >= 4 && array.shape[0] != 1 {
        let reason = format!("has shape {:?}: {} samples; expected one a file", array.shape, array.shape[0]);
        return Err(DataError::source(place.name(), reason));
    }
    Ok(array.of_one_sample())
}

/// The `.npy` files of a folder, in the order of their numbers.
fn npy_files(folder: &Place) -> Result<Vec<Box<str>>, DataError> {
    let Listing { files, .. } = folder.list()?;
    let mut files: Vec<Box<str>> =
        files.into_iter().filter(|name| name.ends_with(".npy")).map(String::into_boxed_str).collect();
    let number = |name: &str| name.trim_end_matches(".npy").parse::<u64>().unwrap_or(u64::MAX);
    files.sort_by(|a, b| number(a).cmp(&number(b)).then_with(|| a.cmp(b)));
    Ok(files)
}

enum Missing<'a> {
    First(&'a str),
    Second(&'a str),
}

/// The first name that only one of two lists in the same order has.
fn first_difference<'a>(first: &'a [Box<str>], second: &'a [Box<str>]) -> Option<Missing<'a>> {
    let at = first.iter().zip(second).position(|(a, b)| a != b).unwrap_or(first.len().min(second.len()));
    match (first.get(at), second.get(at)) {
        (None, None) => None,
        (Some(name), None) => Some(Missing::Second(name)),
        (None, Some(name)) => Some(Missing::First(name)),
        (Some(a), Some(_)) if !second[at..].contains(a) => Some(Missing::Second(a)),
        (Some(_), Some(b)) => Some(Missing::First(b)),
    }
}

fn read_ids(place: &Place, rows: usize) -> Result<Option<Vec<String>>, DataError> {
    if !place.is_file()? {
        return Ok(None);
    }
    let bad = |reason: String| DataError::source(place.name(), reason);
    let text = String::from_utf8(place.read(1 << 40)?).map_err(|error| bad(error.to_string()))?;
    let parse = |(at, line): (usize, &str)| {
        serde_json::from_str::<String>(line).map_err(|error| bad(format!("line {}: {error}", at + 1)))
    };
    let ids = text.lines().enumerate().map(parse).collect::<Result<Vec<_>, _>>()?;
    if ids.len() != rows {
        return Err(bad(format!(
            "names {} samples, but there are {rows}; remove the file to do without names",
            ids.len()
        )));
    }
    Ok(Some(ids))
}

/// Writes the two folders, and the samples' names beside them.
pub(super) struct FastDitSink;

const STEM: &str = "imagenet256";

impl Sink for FastDitSink {
    fn begin(&self, folder: &Path, _: usize) -> Result<(), DataError> {
        for part in [FEATURES, LABELS] {
            let path = folder.join(format!("{STEM}{part}"));
            std::fs::create_dir_all(&path)
                .map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })?;
        }
        Ok(())
    }

    fn part(&self, folder: &Path, part: usize, _: usize, first_row: usize) -> Result<Box<dyn Part>, DataError> {
        Ok(Box::new(FastDitPart { folder: folder.to_owned(), ids: Vec::new(), next_row: first_row, part }))
    }

    fn end(&self, folder: &Path, parts: usize) -> Result<(), DataError> {
        let path = folder.join(IDS);
        let mut ids = Vec::new();
        for part in 0..parts {
            let piece = folder.join(piece_name(part));
            let failed = |error: std::io::Error| DataError::Write {
                file: piece.display().to_string(),
                reason: error.to_string(),
            };
            ids.extend(std::fs::read(&piece).map_err(failed)?);
            std::fs::remove_file(&piece).map_err(failed)?;
        }
        write_file(&path, &ids)
    }
}

fn piece_name(part: usize) -> String {
    format!(".ids-{part}")
}

struct FastDitPart {
    folder: std::path::PathBuf,
    ids: Vec<u8>,
    next_row: usize,
    part: usize,
}

impl Part for FastDitPart {
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError> {
        let shape: Vec<usize> = std::iter::once(1).chain(row.shape.iter().copied()).collect();
        let name = format!("{}.npy", self.next_row);
        let features = npy::write(row.dtype, &shape, row.latents);
        write_file(&self.folder.join(format!("{STEM}{FEATURES}")).join(&name), &features)?;
        let labels = npy::write_integers(&[row.label.unwrap_or(0)]);
        write_file(&self.folder.join(format!("{STEM}{LABELS}")).join(&name), &labels)?;
        self.ids.extend(serde_json::to_string(row.id).unwrap_or_default().bytes());
        self.ids.push(b'\n');
        self.next_row += 1;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        write_file(&self.folder.join(piece_name(self.part)), &self.ids)
    }
}
