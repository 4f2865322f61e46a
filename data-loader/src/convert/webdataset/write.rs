//! Writes tar shards that WebDataset reads: `KEY.latent.npy` or `KEY.moments.npy`, `KEY.cls`, `KEY.json`.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use crate::DataError;
use crate::convert::npy;
use crate::convert::sink::{Part, Sink, SinkRow, durable};

pub(in crate::convert) struct WebDatasetSink {
    pub moments: bool,
    pub flipped: bool,
}

impl Sink for WebDatasetSink {
    fn part(&self, folder: &Path, part: usize, _: usize, first_row: usize) -> Result<Box<dyn Part>, DataError> {
        let path = folder.join(format!("shard-{part:06}.tar"));
        let file = File::create(&path)
            .map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })?;
        let names: &[&str] = match (self.moments, self.flipped) {
            (false, false) => &["latent.npy"],
            (false, true) => &["latent.npy", "latent_flipped.npy"],
            (true, false) => &["moments.npy"],
            (true, true) => &["moments.npy", "moments_flipped.npy"],
        };
        let archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, file));
        Ok(Box::new(TarPart { path, archive, names, next_row: first_row, moments: self.moments }))
    }
}

struct TarPart {
    path: PathBuf,
    archive: tar::Builder<BufWriter<File>>,
    names: &'static [&'static str],
    next_row: usize,
    moments: bool,
}

impl TarPart {
    fn append(&mut self, extension: &str, bytes: &[u8]) -> Result<(), DataError> {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        let name = format!("{:09}.{extension}", self.next_row);
        self.archive
            .append_data(&mut header, name, bytes)
            .map_err(|error| DataError::Write { file: self.path.display().to_string(), reason: error.to_string() })
    }
}

impl Part for TarPart {
    fn push(&mut self, row: SinkRow<'_>) -> Result<(), DataError> {
        // Keys are numbers: a name with a dot would be cut at it. The name itself is in the JSON member.
        let mut shape = row.shape.to_vec();
        if self.moments {
            shape[0] *= 2;
        }
        let columns = if self.moments { 2 } else { 1 };
        for (name, latents) in self.names.iter().zip(row.latents.chunks(columns)) {
            self.append(name, &npy::write(row.dtype, &shape, latents))?;
        }
        let mut about = serde_json::json!({ "id": row.id });
        if let Some(label) = row.label {
            about["label"] = label.into();
            self.append("cls", label.to_string().as_bytes())?;
        }
        self.append("json", about.to_string().as_bytes())?;
        self.next_row += 1;
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), DataError> {
        let path = self.path;
        let written = self.archive.into_inner().and_then(durable);
        written.map_err(|error| DataError::Write { file: path.display().to_string(), reason: error.to_string() })
    }
}
