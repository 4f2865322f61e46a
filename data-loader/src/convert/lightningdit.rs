//! LightningDiT's shards: safetensors files with `latents` `[N, C, H, W]`, `latents_flip` of the same shape and `labels` `[N]`.
//! Its loader subtracts the mean and divides by the standard deviation of each channel, which `latents_stats.pt` holds.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::Dtype as TensorType;
use safetensors::tensor::{Metadata, TensorInfo};

use super::array::{Array, Element, to_bytes};
use super::files::Place;
use super::safetensors::{Header, Rows};
use super::sink::{Part, Sink, SinkRow, durable};
use super::{About, Sample, Source, SourceFormat, SourceOptions, stats};
use crate::{DataError, Dtype};

const LATENTS: &str = "latents";
const FLIPPED: &str = "latents_flip";
const LABELS: &str = "labels";
const STATS: &str = "latents_stats.pt";
/// Names of the samples, which LightningDiT does not know: a JSON array in the header's `__metadata__`.
const IDS: &str = "ditharos.ids";

/// The shards of a folder.
pub(super) struct LightningDit {
    shards: Vec<Shard>,
    about: About,
    rows: usize,
}

struct Shard {
    place: Place,
    first_row: usize,
    rows: usize,
    latents: Rows,
    flipped: Option<Rows>,
    labels: Option<Vec<i64>>,
    ids: Option<Vec<String>>,
}

impl LightningDit {
    /// Opens a folder of shards, or one shard. Keeps all labels in memory.
    ///
    /// # Errors
    /// If a shard is damaged, or shards disagree.
    pub fn open(place: &Place, options: &SourceOptions) -> Result<Self, DataError> {
        let names = &options.names;
        let latents = names.latent.as_deref().unwrap_or(LATENTS);
        let (flipped, label) =
            (names.latent_flipped.as_deref().unwrap_or(FLIPPED), names.label.as_deref().unwrap_or(LABELS));
        let is_shard = |name: &String| name.ends_with(".safetensors");
        let (folder, files) = if place.file_name().ends_with(".safetensors") {
            (place.parent(), vec![place.file_name()])
        } else {
            (place.clone(), place.list()?.files.into_iter().filter(is_shard).collect())
        };
        let mut shards: Vec<Shard> = Vec::new();
        for name in files {
            let first_row = shards.last().map_or(0, |shard: &Shard| shard.first_row + shard.rows);
            shards.push(Shard::open(&folder.join(&name), first_row, latents, flipped, label)?);
        }
        let Some(first) = shards.first() else {
            return Err(DataError::source(place.name(), "holds no .safetensors file"));
        };
        for shard in &shards[1..] {
            shard.agrees_with(first)?;
        }
        let stats_place = match &options.stats {
            Some(stats) => Some(Place::parse(stats)?),
            None => Some(folder.join(STATS)).filter(|place| matches!(place.is_file(), Ok(true))),
        };
        let channels = first.latents.shape.get(1).copied().unwrap_or(0);
        let channel_stats = stats_place.map(|place| stats::read(&place, channels)).transpose()?;
        let about = About {
            name: place.name(),
            format: SourceFormat::LightningDit,
            latent_shape: first.latents.shape[1..].to_vec(),
            row_shapes: false,
            moments: false,
            flipped: first.flipped.is_some(),
            captions: None,
            labels: first.labels.is_some(),
            dtype: first.latents.element.dtype().unwrap_or(Dtype::F32),
            scaling_factor: None,
            num_classes: None,
            vae_digest: None,
            channel_stats,
            sequential: false,
        };
        let rows = shards.last().map_or(0, |shard| shard.first_row + shard.rows);
        Ok(Self { shards, about, rows })
    }

    fn shard_of(&self, row: usize) -> &Shard {
        &self.shards[self.shards.partition_point(|shard| shard.first_row + shard.rows <= row)]
    }
}

impl Shard {
    fn open(place: &Place, first_row: usize, latents: &str, flipped: &str, label: &str) -> Result<Self, DataError> {
        let header = Header::read(place)?;
        let bad = |reason: String| DataError::source(place.name(), reason);
        let Some(latents_rows) = header.rows(latents)? else {
            return Err(bad(format!("has no tensor `{latents}`; it has {}", header.names())));
        };
        let rows = latents_rows.shape[0];
        let checked = |name: &str, tensor: &Rows| {
            if tensor.element.dtype().is_none() {
                return Err(bad(format!("tensor `{name}` holds {}; expected floats", tensor.element.name())));
            }
            if tensor.shape != latents_rows.shape || tensor.shape.len() < 2 || rows == 0 {
                return Err(bad(format!(
                    "tensor `{name}` has shape {:?}, `{latents}` {:?}; expected [samples, channels, …] of both",
                    tensor.shape, latents_rows.shape
                )));
            }
            Ok(())
        };
        checked(latents, &latents_rows)?;
        let flipped_rows = header.rows(flipped)?;
        if let Some(tensor) = &flipped_rows {
            checked(flipped, tensor)?;
        }
        let labels = match header.rows(label)? {
            None => None,
            Some(tensor) => {
                let labels = tensor.element.integers(&place.read_range(tensor.whole())?);
                let labels = labels.map_err(|reason| bad(format!("tensor `{label}` {reason}")))?;
                if labels.len() != rows {
                    return Err(bad(format!("tensor `{label}` has {} rows, `{latents}` {rows}", labels.len())));
                }
                Some(labels)
            }
        };
        let ids = match header.about(IDS) {
            None => None,
            Some(text) => {
                let ids: Vec<String> =
                    serde_json::from_str(text).map_err(|error| bad(format!("metadata `{IDS}`: {error}")))?;
                if ids.len() != rows {
                    return Err(bad(format!("metadata `{IDS}` has {} names for {rows} samples", ids.len())));
                }
                Some(ids)
            }
        };
        Ok(Self { place: place.clone(), first_row, rows, latents: latents_rows, flipped: flipped_rows, labels, ids })
    }

    fn agrees_with(&self, first: &Shard) -> Result<(), DataError> {
        let about = |shard: &Shard| {
            format!(
                "latents {:?} of {}, {} mirrored ones, {} labels",
                &shard.latents.shape[1..],
                shard.latents.element.name(),
                if shard.flipped.is_some() { "with" } else { "without" },
                if shard.labels.is_some() { "with" } else { "without" }
            )
        };
        if about(self) == about(first) {
            return Ok(());
        }
        let reason = format!("holds {}, but {} holds {}", about(self), first.place.name(), about(first));
        Err(DataError::source(self.place.name(), reason))
    }

    fn id(&self, row: usize) -> String {
        match &self.ids {
            Some(ids) => ids[row].clone(),
            None => format!("{}/{row}", self.place.file_name().trim_end_matches(".safetensors")),
        }
    }
}

impl Source for LightningDit {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.rows
    }

    fn place(&self, row: usize) -> String {
        let shard = self.shard_of(row);
        format!("{}: row {}", shard.place.name(), row - shard.first_row)
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        let label = |row: usize| {
            let shard = self.shard_of(row);
            shard.labels.as_ref().map_or(0, |labels| labels[row - shard.first_row])
        };
        Ok(rows.map(label).collect())
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        let id = |row: usize| {
            let shard = self.shard_of(row);
            shard.id(row - shard.first_row)
        };
        Ok(rows.map(id).collect())
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let mut samples: Vec<Option<Sample>> = vec![None; rows.len()];
        let mut by_shard: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for (at, &row) in rows.iter().enumerate() {
            by_shard.entry(self.shard_of(row).first_row).or_default().push(at);
        }
        for places in by_shard.values() {
            let shard = self.shard_of(rows[places[0]]);
            let tensors: Vec<&Rows> = std::iter::once(&shard.latents).chain(&shard.flipped).collect();
            let local: Vec<usize> = places.iter().map(|&at| rows[at] - shard.first_row).collect();
            let ranges: Vec<_> =
                local.iter().flat_map(|&row| tensors.iter().map(move |tensor| tensor.range(row))).collect();
            let mut read = shard.place.read_ranges(&ranges)?.into_iter();
            for (&at, &row) in places.iter().zip(&local) {
                let mut latents = Vec::with_capacity(tensors.len());
                for (tensor, bytes) in tensors.iter().zip(&mut read) {
                    let array = Array::of(tensor.element, tensor.shape[1..].to_vec(), &bytes);
                    latents.push(array.map_err(|reason| DataError::source(self.place(rows[at]), reason))?);
                }
                samples[at] = Some(Sample { latents, captions: Vec::new(), id: shard.id(row) });
            }
        }
        Ok(samples.into_iter().flatten().collect())
    }
}

/// Writes shards that LightningDiT reads. A part's tensors wait in memory until it is finished.
pub(super) struct LightningDitSink {
    pub flipped: bool,
    pub labels: bool,
}

impl Sink for LightningDitSink {
    fn part(&self, folder: &Path, part: usize, _: usize, _: usize) -> Result<Box<dyn Part>, DataError> {
        Ok(Box::new(ShardPart {
            path: folder.join(format!("latents_rank00_shard{part:03}.safetensors")),
            dtype: Dtype::F32,
            shape: Vec::new(),
            latents: vec![Vec::new(); 1 + usize::from(self.flipped)],
            labels: self.labels.then(Vec::new),
            ids: Vec::new(),
        }))
    }
}

struct ShardPart {
    path: PathBuf,
    dtype: Dtype,
    shape: Vec<usize>,
    latents: Vec<Vec<u8>>,
    labels: Option<Vec<i64>>,
    ids: Vec<String>,
}

impl Part for ShardPart {
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError> {
        (self.dtype, self.shape) = (row.dtype, row.shape.to_vec());
        for (bytes, latent) in self.latents.iter_mut().zip(row.latents) {
            to_bytes(row.dtype, latent, bytes);
        }
        if let Some(labels) = &mut self.labels {
            labels.push(row.label.unwrap_or(0));
        }
        self.ids.push(row.id.to_owned());
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        let refuse = |reason: String| DataError::Write { file: self.path.display().to_string(), reason };
        let rows = self.ids.len();
        let shape: Vec<usize> = std::iter::once(rows).chain(self.shape.iter().copied()).collect();
        let dtype = match Element::Float(self.dtype) {
            Element::Float(Dtype::F16) => TensorType::F16,
            Element::Float(Dtype::Bf16) => TensorType::BF16,
            _ => TensorType::F32,
        };
        let labels: Option<Vec<u8>> =
            self.labels.as_ref().map(|labels| labels.iter().flat_map(|label| label.to_le_bytes()).collect());
        let mut tensors: Vec<(&str, TensorType, Vec<usize>, &[u8])> = vec![];
        if let Some(labels) = &labels {
            tensors.push((LABELS, TensorType::I64, vec![rows], labels));
        }
        for (name, bytes) in [LATENTS, FLIPPED].into_iter().zip(&self.latents) {
            tensors.push((name, dtype, shape.clone(), bytes));
        }
        let mut end = 0;
        let placed = tensors.iter().map(|(name, dtype, shape, bytes)| {
            let start = end;
            end += bytes.len();
            ((*name).to_owned(), TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) })
        });
        let ids = serde_json::to_string(&self.ids).map_err(|error| refuse(error.to_string()))?;
        let about = HashMap::from([("format".to_owned(), "pt".to_owned()), (IDS.to_owned(), ids)]);
        let metadata = Metadata::new(Some(about), placed.collect()).map_err(|error| refuse(error.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|error| refuse(error.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let write = || {
            let mut file = BufWriter::new(File::create(&self.path)?);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)?;
            for (_, _, _, bytes) in &tensors {
                file.write_all(bytes)?;
            }
            durable(file)
        };
        write().map_err(|error: std::io::Error| refuse(error.to_string()))
    }
}
