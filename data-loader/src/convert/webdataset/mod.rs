//! WebDataset: tar shards in which the members of a sample share a key: `KEY.latent.npy`, `KEY.cls`, `KEY.json`.

mod scan;
mod write;

use std::collections::BTreeMap;
use std::ops::Range;

use super::files::Place;
use super::{About, Sample, Source, SourceFormat, SourceOptions, npy};
use crate::{DataError, Dtype};
use scan::{Indexed, Members};
pub(super) use write::WebDatasetSink;

/// The shards of a folder. Memory: about 120 bytes a sample and its key.
pub(super) struct WebDataset {
    shards: Vec<Place>,
    samples: Vec<Indexed>,
    members: Members,
    about: About,
}

impl WebDataset {
    /// Reads the headers of all shards, and their labels: of a folder's `*.tar`, of one file, or of a pattern such as
    /// `train-{000000..000123}.tar`, in which `*` and `?` are understood too.
    ///
    /// # Errors
    /// If a shard is cut short, or a sample lacks a member.
    pub fn open(place: &Place, options: &SourceOptions) -> Result<Self, DataError> {
        let shards = shards(place)?;
        let mut members = None;
        let mut samples = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            scan::shard(number, shard, &options.names, &mut members, &mut samples)?;
        }
        let (Some(members), false) = (members, samples.is_empty()) else {
            return Err(DataError::source(place.name(), "holds no sample"));
        };
        let mut source = Self {
            about: About {
                name: place.name(),
                format: SourceFormat::WebDataset,
                latent_shape: Vec::new(),
                row_shapes: false,
                moments: members.roles.moments(),
                flipped: members.roles.flipped,
                captions: None,
                labels: samples.iter().all(|sample| sample.label.is_some()),
                dtype: Dtype::F32,
                scaling_factor: None,
                num_classes: None,
                vae_digest: None,
                channel_stats: None,
                sequential: false,
            },
            shards,
            samples,
            members,
        };
        if !source.about.labels && source.samples.iter().any(|sample| sample.label.is_some()) {
            let row = source.samples.iter().position(|sample| sample.label.is_none()).unwrap_or(0);
            return Err(DataError::source(source.place(row), "has no label, but others have one"));
        }
        let first = source.read(&[0])?;
        let latent = &first[0].latents[0];
        source.about.latent_shape.clone_from(&latent.shape);
        source.about.dtype = latent.element.dtype().unwrap_or(Dtype::F32);
        Ok(source)
    }
}

impl Source for WebDataset {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.samples.len()
    }

    fn place(&self, row: usize) -> String {
        let sample = &self.samples[row];
        format!("{}: sample `{}`", self.shards[sample.shard as usize].name(), sample.key)
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        Ok(self.samples[rows].iter().filter_map(|sample| sample.label).collect())
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        Ok(self.samples[rows].iter().map(|sample| sample.id().to_owned()).collect())
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let mut by_shard: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
        for (at, &row) in rows.iter().enumerate() {
            by_shard.entry(self.samples[row].shard).or_default().push(at);
        }
        let mut samples: Vec<Option<Sample>> = vec![None; rows.len()];
        for (shard, places) in by_shard {
            let ranges: Vec<Range<u64>> =
                places.iter().flat_map(|&at| self.samples[rows[at]].members.iter().cloned()).collect();
            let mut read = self.shards[shard as usize].read_ranges(&ranges)?.into_iter();
            for at in places {
                let sample = &self.samples[rows[at]];
                let mut latents = Vec::new();
                for name in &self.members.roles.names {
                    let refuse =
                        |reason| DataError::source(format!("{}: member `.{name}`", self.place(rows[at])), reason);
                    let array = npy::array(&read.next().unwrap_or_default()).map_err(refuse)?;
                    latents.extend(self.members.roles.latents(array).map_err(refuse)?);
                }
                samples[at] = Some(Sample { latents, captions: Vec::new(), id: sample.id().to_owned() });
            }
        }
        Ok(samples.into_iter().flatten().collect())
    }
}

type Matches = Box<dyn Fn(&str) -> bool>;

/// The tar files that a place names.
fn shards(place: &Place) -> Result<Vec<Place>, DataError> {
    /// More numbers between braces are taken for a slip.
    const MOST: u64 = 1_000_000;
    let name = place.file_name();
    if let Some((front, numbers, back)) = braces(&name) {
        let Some((first, last)) = numbers.split_once("..") else {
            return Err(DataError::source(place.name(), "has braces that are not of the form {000000..000123}"));
        };
        let (Ok(from), Ok(to)) = (first.parse::<u64>(), last.parse::<u64>()) else {
            return Err(DataError::source(place.name(), "has braces that do not hold two numbers"));
        };
        if from > to || to - from > MOST {
            return Err(DataError::source(
                place.name(),
                format!("counts from {from} to {to}; expected up to {MOST} shards"),
            ));
        }
        let (folder, width) = (place.parent(), first.len());
        return Ok((from..=to).map(|number| folder.join(&format!("{front}{number:0width$}{back}"))).collect());
    }
    let (folder, matches): (Place, Matches) = if name.contains(['*', '?', '[']) {
        let pattern = glob::Pattern::new(&name)
            .map_err(|error| DataError::source(place.name(), format!("is no pattern: {error}")))?;
        (place.parent(), Box::new(move |file| pattern.matches(file)))
    } else if name.ends_with(".tar") {
        return Ok(vec![place.clone()]);
    } else {
        (place.clone(), Box::new(|file| file.ends_with(".tar")))
    };
    let files = folder.list()?.files;
    let shards: Vec<Place> = files.iter().filter(|file| matches(file)).map(|file| folder.join(file)).collect();
    if shards.is_empty() {
        let packed = files.iter().find(|file| file.ends_with(".tar.gz") || file.ends_with(".tgz"));
        let advice = packed.map_or(String::new(), |file| format!("; unpack {file} with gunzip first"));
        return Err(DataError::source(place.name(), format!("there is no .tar file{advice}")));
    }
    Ok(shards)
}

fn braces(name: &str) -> Option<(&str, &str, &str)> {
    let (front, rest) = name.split_once('{')?;
    let (inside, back) = rest.split_once('}')?;
    Some((front, inside, back))
}
