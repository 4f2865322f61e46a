//! Parquet as the trainer reads it, as a source.

use std::ops::Range;

use super::array::{Array, Element};
use super::{About, CaptionArray, Sample, Source, SourceFormat, SourceOptions};
use crate::read::Want;
use crate::{DataError, LatentDataset, RowBlock, RowRun, Shapes};

/// A data set that is laid out anew.
pub(super) struct ParquetSource {
    dataset: LatentDataset,
    has_ids: bool,
    about: About,
}

impl ParquetSource {
    /// # Errors
    /// As [`LatentDataset::open`].
    pub fn open(url: &str, options: &SourceOptions) -> Result<Self, DataError> {
        let mut columns = options.names.columns();
        if options.drop_captions {
            // No column has an empty name.
            columns.caption.clear();
        }
        let dataset = LatentDataset::open(url, &columns)?;
        let meta = dataset.meta();
        if options.names.caption.is_some() && !options.drop_captions && meta.captions.is_none() {
            return Err(dataset.no_captions());
        }
        let row_shapes = meta.shapes != Shapes::Same;
        let about = About {
            name: dataset.name().to_owned(),
            format: SourceFormat::Parquet,
            latent_shape: if row_shapes { dataset.row_shapes()?.of(0).to_vec() } else { meta.latent_shape.clone() },
            row_shapes,
            moments: meta.moments,
            flipped: meta.flipped,
            captions: meta.captions,
            labels: meta.labels,
            dtype: meta.dtype,
            scaling_factor: meta.scaling_factor,
            num_classes: meta.num_classes,
            vae_digest: meta.vae_digest.clone(),
            channel_stats: None,
            sequential: true,
        };
        let has_ids =
            dataset.files.iter().all(|file| file.metadata.schema().column_with_name(&dataset.columns().id).is_some());
        Ok(Self { dataset, has_ids, about })
    }

    fn block(&self, rows: Range<usize>, with_ids: bool) -> Result<RowBlock, DataError> {
        let run = RowRun { first_row: rows.start as u64, rows: rows.len() as u64 };
        let want = if with_ids && self.has_ids { Want::WithIds } else { Want::All };
        self.dataset.io.block_on(self.dataset.read_runs(&[run], want))
    }

    /// The captions of rows that follow one another.
    fn captions(&self, rows: &[usize]) -> Result<Vec<Vec<CaptionArray>>, DataError> {
        let Some(meta) = self.about.captions else { return Ok(vec![Vec::new(); rows.len()]) };
        let run = RowRun { first_row: rows[0] as u64, rows: rows.len() as u64 };
        let block = self.dataset.read_captions(&[run])?;
        let caption = |index: usize, which: usize| {
            let (mut embeddings, mut mask) = (Vec::new(), Vec::new());
            block.caption_into(index, which, &mut embeddings, &mut mask);
            CaptionArray { embeddings, mask: meta.masked.then_some(mask) }
        };
        let of_row = |index: usize| (0..block.count(index)).map(|which| caption(index, which)).collect();
        Ok((0..block.len()).map(of_row).collect())
    }

    /// The names of a block's rows: their numbers where the files have none.
    fn ids_of(&self, block: &RowBlock) -> Vec<String> {
        if self.has_ids { block.ids.clone() } else { block.rows().iter().map(u64::to_string).collect() }
    }
}

impl Source for ParquetSource {
    fn about(&self) -> &About {
        &self.about
    }

    fn rows(&self) -> usize {
        self.dataset.meta().rows as usize
    }

    fn place(&self, row: usize) -> String {
        self.dataset.place_of(row as u64)
    }

    fn labels(&self, rows: Range<usize>) -> Result<Vec<i64>, DataError> {
        Ok(self.block(rows, false)?.labels().to_vec())
    }

    fn ids(&self, rows: Range<usize>) -> Result<Vec<String>, DataError> {
        Ok(self.ids_of(&self.block(rows, true)?))
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Sample>, DataError> {
        let mut samples = Vec::with_capacity(rows.len());
        for run in rows.chunk_by(|a, b| a + 1 == *b) {
            let block = self.block(run[0]..run[0] + run.len(), true)?;
            let captions = self.captions(run)?;
            for ((index, id), captions) in self.ids_of(&block).into_iter().enumerate().zip(captions) {
                let array = |column: usize| {
                    let mut numbers = vec![0.0; block.latent_numel(index)];
                    block.latent(column, index, &mut numbers);
                    Array {
                        element: Element::Float(self.about.dtype),
                        shape: block.latent_shape(index).to_vec(),
                        numbers,
                    }
                };
                samples.push(Sample { latents: (0..block.latent_columns()).map(array).collect(), captions, id });
            }
        }
        Ok(samples)
    }
}
