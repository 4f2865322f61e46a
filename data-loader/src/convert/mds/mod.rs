//! MosaicML Streaming's shards (MDS): an `index.json` of version 2 and files of rows with named columns.

mod encoding;
mod index;
mod shard;
mod write;

use std::ops::Range;

use super::files::Place;
use super::roles::Roles;
use super::{About, Sample, Source, SourceFormat, SourceOptions};
use crate::{DataError, Dtype};
use encoding::{ArrayEncoding, IntEncoding};
use shard::Shards;
pub(super) use write::MdsSink;

/// The shards that an index names. Memory: those that are in use, where they are compressed.
pub(super) struct Mds {
    shards: Shards,
    columns: Columns,
    about: About,
}

/// Which columns hold what, by their number.
struct Columns {
    roles: Roles,
    /// In the order of the roles.
    latents: Vec<(usize, ArrayEncoding)>,
    label: Option<(usize, IntEncoding)>,
    /// Text or an integer.
    id: Option<(usize, Option<IntEncoding>)>,
}

impl Mds {
    /// Opens a folder with an `index.json`, or the index itself.
    ///
    /// # Errors
    /// If the index cannot be understood, or no column holds latents.
    pub fn open(place: &Place, options: &SourceOptions) -> Result<Self, DataError> {
        let folder = if place.file_name() == index::NAME { place.parent() } else { place.clone() };
        let index = index::read(&folder)?;
        let columns = Columns::find(&index.columns, options)
            .map_err(|reason| DataError::source(folder.join(index::NAME).name(), reason))?;
        let mut source = Self {
            about: About {
                name: folder.name(),
                format: SourceFormat::Mds,
                latent_shape: Vec::new(),
                row_shapes: false,
                moments: columns.roles.moments(),
                flipped: columns.roles.flipped,
                captions: None,
                labels: columns.label.is_some(),
                dtype: Dtype::F32,
                scaling_factor: None,
                num_classes: None,
                vae_digest: None,
                channel_stats: None,
                sequential: index.compression.is_some(),
            },
            shards: Shards::new(folder, index),
            columns,
        };
        let first = source.read(&[0])?;
        let latent = &first[0].latents[0];
        source.about.latent_shape.clone_from(&latent.shape);
        source.about.dtype = latent.element.dtype().unwrap_or(Dtype::F32);
        Ok(source)
    }

    fn id(&self, row: usize, columns: &[&[u8]]) -> Result<String, DataError> {
        let refuse = |reason: String| DataError::source(format!("{}: column of the id", self.place(row)), reason);
        match &self.columns.id {
            None => Ok(row.to_string()),
            Some((at, Some(integer))) => Ok(integer.read(columns[*at]).map_err(refuse)?.to_string()),
            Some((at, None)) => {
                Ok(std::str::from_utf8(columns[*at]).map_err(|error| refuse(error.to_string()))?.to_owned())
            }
        }
    }
}

impl Columns {
    fn find(columns: &[(String, String)], options: &SourceOptions) -> Result<Self, String> {
        let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
        let roles = Roles::find(&options.names, &names, "", None)?;
        let place = |name: &str| names.iter().position(|other| *other == name);
        let mut latents = Vec::new();
        for name in &roles.names {
            // The roles are of names that are there.
            let at = place(name).unwrap_or(0);
            let encoding = ArrayEncoding::parse(&columns[at].1, options.shape.as_deref(), options.bytes_dtype);
            latents.push((at, encoding.map_err(|reason| format!("column `{name}` {reason}"))?));
        }
        let find = |given: &Option<String>, usual: &[&str]| match given {
            Some(name) => match place(name) {
                Some(at) => Ok(Some(at)),
                None => Err(format!("has no column `{name}`; it has {}", names.join(", "))),
            },
            None => Ok(usual.iter().find_map(|name| place(name))),
        };
        let label = find(&options.names.label, &["label", "labels", "class", "cls"])?
            .map(|at| {
                let encoding = IntEncoding::parse(&columns[at].1);
                encoding.map(|encoding| (at, encoding)).ok_or_else(|| {
                    let (name, encoding) = &columns[at];
                    format!("column `{name}` is stored as {encoding}; expected integers; name another with --column label=NAME")
                })
            })
            .transpose()?;
        let id = find(&options.names.id, &["id", "key", "__key__"])?.map(|at| {
            let encoding = IntEncoding::parse(&columns[at].1);
            (at, encoding)
        });
        if let Some((at, None)) = id
            && columns[at].1 != "str"
        {
            let (name, encoding) = &columns[at];
            return Err(format!("column `{name}` is stored as {encoding}; expected str or integers as names"));
        }
        Ok(Self { roles, latents, label, id })
    }
}

impl Source for Mds {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.shards.rows()
    }

    fn place(&self, row: usize) -> String {
        self.shards.place(row)
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        let Some((at, encoding)) = &self.columns.label else { return Ok(vec![0; rows.len()]) };
        let rows: Vec<usize> = rows.collect();
        let mut labels = Vec::with_capacity(rows.len());
        self.shards.each(&rows, |row, columns| {
            labels.push(encoding.read(columns[*at]).map_err(|reason| DataError::source(self.place(row), reason))?);
            Ok(())
        })?;
        Ok(labels)
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        let rows: Vec<usize> = rows.collect();
        let mut ids = Vec::with_capacity(rows.len());
        self.shards.each(&rows, |row, columns| {
            ids.push(self.id(row, columns)?);
            Ok(())
        })?;
        Ok(ids)
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let mut samples = Vec::with_capacity(rows.len());
        self.shards.each(rows, |row, columns| {
            let mut latents = Vec::new();
            for ((at, encoding), name) in self.columns.latents.iter().zip(&self.columns.roles.names) {
                let refuse = |reason| DataError::source(format!("{}: column `{name}`", self.place(row)), reason);
                let array = encoding.read(columns[*at]).map_err(refuse)?;
                latents.extend(self.columns.roles.latents(array).map_err(refuse)?);
            }
            samples.push(Sample { latents, captions: Vec::new(), id: self.id(row, columns)? });
            Ok(())
        })?;
        Ok(samples)
    }
}
