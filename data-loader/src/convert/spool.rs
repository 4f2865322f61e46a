//! Samples of a source that is fast only in its own order, copied to a file from which they can be read in any.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::array::{Array, Element, to_bytes};
use super::{About, Sample, Source};
use crate::DataError;

/// Rows that are copied at a time.
const ROWS_AT_ONCE: usize = 1024;

/// A source's latents in a scratch file without a name, which is gone with the process. Memory: the names, and 40 bytes a row.
pub(super) struct Spool<'a> {
    source: &'a dyn Source,
    about: About,
    file: File,
    ids: Vec<String>,
    /// Where each sample begins, and the shape of its latents where it is not the first one's.
    samples: Vec<(u64, Option<Vec<usize>>)>,
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
                samples.push((end + bytes.len() as u64, (shape != about.latent_shape).then_some(shape)));
                for latent in &sample.latents {
                    let dtype = latent.element.dtype().filter(|dtype| *dtype == about.dtype).ok_or_else(|| {
                        let found = latent.element.name();
                        DataError::source(source.place(row), format!("holds {found}; the first sample {}", about.dtype))
                    })?;
                    to_bytes(dtype, &latent.numbers, &mut bytes);
                }
                ids.push(sample.id);
            }
            file.write_all_at(&bytes, end).map_err(failed)?;
            end += bytes.len() as u64;
            progress(batch.len());
        }
        samples.push((end, None));
        Ok(Self { source, about, file, ids, samples })
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
                let (start, shape) = &self.samples[row];
                let mut bytes = vec![0; (self.samples[row + 1].0 - start) as usize];
                self.file
                    .read_exact_at(&mut bytes, *start)
                    .map_err(|error| DataError::source(self.place(row), format!("its copy cannot be read: {error}")))?;
                let shape = shape.as_ref().unwrap_or(&self.about.latent_shape);
                let latents = bytes
                    .chunks_exact(bytes.len() / columns)
                    .map(|bytes| Array::of(element, shape.clone(), bytes))
                    .collect::<Result<Vec<_>, _>>()
                    .map_err(|reason| DataError::source(self.place(row), reason))?;
                Ok(Sample { latents, id: self.ids[row].clone() })
            })
            .collect()
    }
}
