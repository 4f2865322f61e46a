//! Writes shards and the index that MosaicML Streaming reads. A part's rows wait in memory until it is finished.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;

use sha1::{Digest, Sha1};

use super::index::{FileEntry, NAME, ShardEntry};
use crate::convert::array::{Element, to_bytes};
use crate::convert::sink::{Part, Sink, SinkRow, durable};
use crate::{DataError, WriterOptions};

const HASH: &str = "sha1";

/// The columns of all shards, and the entries of those that are finished.
pub(in crate::convert) struct MdsSink {
    latents: Vec<String>,
    /// `None` where rows have shapes of their own.
    shape: Option<Vec<usize>>,
    element: Element,
    labels: bool,
    finished: std::sync::Arc<Mutex<BTreeMap<usize, ShardEntry>>>,
}

impl MdsSink {
    pub fn new(options: &WriterOptions) -> Self {
        Self {
            latents: options.latent_columns(),
            shape: (!options.row_shapes).then(|| options.latent_shape.clone()),
            element: Element::Float(options.dtype),
            labels: options.labels,
            finished: Default::default(),
        }
    }

    /// Names, encodings and sizes, in the order of the names, as Streaming's own writer has them.
    fn columns(&self) -> BTreeMap<String, (String, Option<usize>)> {
        let mut columns = BTreeMap::from([("id".to_owned(), ("str".to_owned(), None))]);
        if self.labels {
            columns.insert("label".into(), ("int".into(), Some(8)));
        }
        for name in &self.latents {
            let mut encoding = format!("ndarray:{}", self.element.name());
            if let Some(shape) = &self.shape {
                let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
                encoding += &format!(":{}", dims.join(","));
            }
            let bytes = self.shape.as_ref().map(|shape| shape.iter().product::<usize>() * self.element.bytes());
            columns.insert(name.clone(), (encoding, bytes));
        }
        columns
    }
}

impl Sink for MdsSink {
    fn part(&self, folder: &Path, part: usize, _: usize, _: usize) -> Result<Box<dyn Part>, DataError> {
        Ok(Box::new(ShardPart {
            path: folder.join(format!("shard.{part:05}.mds")),
            part,
            columns: self.columns(),
            latents: self.latents.clone(),
            row_shapes: self.shape.is_none(),
            ends: vec![0],
            rows: Vec::new(),
            finished: self.finished.clone(),
        }))
    }

    fn end(&self, folder: &Path, _: usize) -> Result<(), DataError> {
        let path = folder.join(NAME);
        let shards: Vec<ShardEntry> =
            self.finished.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let index = serde_json::json!({ "version": 2, "shards": shards });
        let write = || {
            let mut file = BufWriter::new(File::create(&path)?);
            serde_json::to_writer(&mut file, &index)?;
            durable(file)
        };
        write().map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })
    }
}

struct ShardPart {
    path: PathBuf,
    part: usize,
    columns: BTreeMap<String, (String, Option<usize>)>,
    latents: Vec<String>,
    row_shapes: bool,
    /// Where each row ends in `rows`.
    ends: Vec<u64>,
    rows: Vec<u8>,
    finished: std::sync::Arc<Mutex<BTreeMap<usize, ShardEntry>>>,
}

impl Part for ShardPart {
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError> {
        let (mut lengths, mut values) = (Vec::new(), Vec::new());
        for (name, (_, size)) in &self.columns {
            let start = values.len();
            match name.as_str() {
                "id" => values.extend(row.id.bytes()),
                "label" => values.extend(row.label.unwrap_or(0).to_le_bytes()),
                _ => {
                    if self.row_shapes {
                        // Axes, and that each length has four bytes (`2` for two to the second).
                        values.push(((row.shape.len() as u8) << 2) | 2);
                        values.extend(row.shape.iter().flat_map(|&dim| (dim as u32).to_le_bytes()));
                    }
                    let column = self.latents.iter().position(|latent| latent == name).unwrap_or(0);
                    to_bytes(row.dtype, row.latents[column], &mut values);
                }
            }
            if size.is_none() {
                lengths.extend(((values.len() - start) as u32).to_le_bytes());
            }
        }
        self.rows.extend(lengths);
        self.rows.extend(values);
        self.ends.push(self.rows.len() as u64);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        let refuse = |reason: String| DataError::Write { file: self.path.display().to_string(), reason };
        let samples = self.ends.len() - 1;
        let mut entry = ShardEntry {
            column_encodings: self.columns.values().map(|(encoding, _)| encoding.clone()).collect(),
            column_names: self.columns.keys().cloned().collect(),
            column_sizes: self.columns.values().map(|(_, size)| *size).collect(),
            compression: None,
            format: "mds".into(),
            hashes: vec![HASH.into()],
            raw_data: FileEntry { basename: String::new(), bytes: 0, hashes: BTreeMap::new() },
            samples,
            size_limit: None,
            version: 2,
            zip_data: None,
        };
        let config = serde_json::json!({
            "column_encodings": entry.column_encodings,
            "column_names": entry.column_names,
            "column_sizes": entry.column_sizes,
            "compression": null,
            "format": entry.format,
            "hashes": entry.hashes,
            "size_limit": null,
            "version": entry.version,
        })
        .to_string();
        let rows_start = 4 + self.ends.len() as u64 * 4 + config.len() as u64;
        let bytes = rows_start + self.rows.len() as u64;
        if bytes > u64::from(u32::MAX) {
            return Err(refuse(format!("has {bytes} bytes; a shard has at most 4 GiB: take a smaller --file-bytes")));
        }
        let mut head = (samples as u32).to_le_bytes().to_vec();
        head.extend(self.ends.iter().flat_map(|end| ((rows_start + end) as u32).to_le_bytes()));
        head.extend(config.bytes());
        let write = || {
            let mut file = BufWriter::new(File::create(&self.path)?);
            file.write_all(&head)?;
            file.write_all(&self.rows)?;
            durable(file)
        };
        write().map_err(|error: std::io::Error| refuse(error.to_string()))?;
        let digest = Sha1::new().chain_update(&head).chain_update(&self.rows).finalize();
        entry.raw_data = FileEntry {
            basename: self.path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            bytes,
            hashes: BTreeMap::from([(HASH.to_owned(), digest.iter().map(|byte| format!("{byte:02x}")).collect())]),
        };
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).insert(self.part, entry);
        Ok(())
    }
}
