//! Samples of a source that is fast only in its own order, copied to a file from which they can be read in any.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::array::{Array, Element, to_bytes};
use super::{About, CaptionArray, Sample, Source};
use crate::DataError;

/// Rows that are copied at a time.
const ROWS_AT_ONCE: usize = 1024;

/// A source's latents in a scratch file without a name, which is gone with the process. Memory: the names, and 40 bytes a row.
pub(super) struct Spool<'a> {
    source: &'a dyn Source,
    about: About,
    file: File,
    ids: Vec<String>,
    samples: Vec<Spooled>,
    end: u64,
}

/// Where a sample is in the file: its latents, then each caption with its mask.
struct Spooled {
    start: u64,
    /// The shape of its latents, where it is not the first one's.
    shape: Option<Vec<usize>>,
    /// Tokens of each caption.
    tokens: Vec<u32>,
}

impl<'a> Spool<'a> {
    /// Copies a source to a file in `folder`; `progress` is told the rows of each batch.
    ///
    /// # Errors
    /// If a sample cannot be read, its numbers are of another type than the first sample's, or the disk is full.
    pub fn copy(source: &'a dyn Source, folder: &Path, progress: &dyn Fn(usize)) -> Result<Self, DataError> {
        let about = About { sequential: false, ..source.about().clone() };
        let failed =
            |error: std::io::Error| DataError::Write { file: folder.display().to_string(), reason: error.to_string() };
        let file = tempfile::tempfile_in(folder).map_err(failed)?;
        let (mut ids, mut samples, mut end) = (Vec::new(), Vec::new(), 0u64);
        let rows: Vec<usize> = (0..source.rows()).collect();
        for batch in rows.chunks(ROWS_AT_ONCE) {
            let mut bytes = Vec::new();
            for (sample, &row) in source.read(batch)?.into_iter().zip(batch) {
                let shape = sample.latents.first().map(|latent| latent.shape.clone()).unwrap_or_default();
                let start = end + bytes.len() as u64;
                for latent in &sample.latents {
                    let dtype = latent.element.dtype().filter(|dtype| *dtype == about.dtype).ok_or_else(|| {
                        let found = latent.element.name();
                        DataError::source(source.place(row), format!("holds {found}; the first sample {}", about.dtype))
                    })?;
                    to_bytes(dtype, &latent.numbers, &mut bytes);
                }
                let mut tokens = Vec::new();
                for CaptionArray { embeddings, mask } in &sample.captions {
                    let Some(meta) = about.captions else { break };
                    to_bytes(meta.dtype, embeddings, &mut bytes);
                    bytes.extend(mask.iter().flatten().map(|counts| u8::from(*counts)));
                    tokens.push((embeddings.len() / meta.dim) as u32);
                }
                samples.push(Spooled { start, shape: (shape != about.latent_shape).then_some(shape), tokens });
                ids.push(sample.id);
            }
            file.write_all_at(&bytes, end).map_err(failed)?;
            end += bytes.len() as u64;
            progress(batch.len());
        }
        Ok(Self { source, about, file, ids, samples, end })
    }
}

impl Source for Spool<'_> {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.ids.len()
    }

    fn place(&self, row: usize) -> String {
        self.source.place(row)
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        self.source.labels(rows)
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        Ok(self.ids[rows].to_vec())
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let columns = (1 + usize::from(self.about.moments)) * (1 + usize::from(self.about.flipped));
        let element = Element::Float(self.about.dtype);
        rows.iter()
            .map(|&row| {
                let Spooled { start, shape, tokens } = &self.samples[row];
                let end = self.samples.get(row + 1).map_or(self.end, |next| next.start);
                let mut bytes = vec![0; (end - start) as usize];
                self.file
                    .read_exact_at(&mut bytes, *start)
                    .map_err(|error| DataError::source(self.place(row), format!("its copy cannot be read: {error}")))?;
                let refuse = |reason: String| DataError::source(self.place(row), reason);
                let shape = shape.as_ref().unwrap_or(&self.about.latent_shape);
                let latent_bytes = shape.iter().product::<usize>() * element.bytes();
                let (latents, mut rest) = bytes.split_at(columns * latent_bytes);
                let latents = latents
                    .chunks_exact(latent_bytes)
                    .map(|bytes| Array::of(element, shape.clone(), bytes))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(refuse)?;
                let mut captions = Vec::with_capacity(tokens.len());
                for (&tokens, meta) in tokens.iter().zip(std::iter::repeat(self.about.captions).flatten()) {
                    let (numbers, after) = rest.split_at(tokens as usize * meta.dim * meta.dtype.bytes());
                    let (mask, after) = after.split_at(if meta.masked { tokens as usize } else { 0 });
                    let embeddings = Element::Float(meta.dtype).floats(numbers).map_err(refuse)?;
                    let mask = meta.masked.then(|| mask.iter().map(|counts| *counts != 0).collect());
                    captions.push(CaptionArray { embeddings, mask });
                    rest = after;
                }
                Ok(Sample { latents, captions, id: self.ids[row].clone() })
            })
            .collect()
    }
}
