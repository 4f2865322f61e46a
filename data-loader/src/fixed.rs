//! Chosen rows as the model sees them, the same on every call: what held-out losses are measured on.

use crate::draws::{Key, Purpose, fill_normal};
use crate::read::Want;
use crate::{DataError, LatentDataset, RowRun};

/// Rows that are decoded at a time.
const ROWS_AT_ONCE: usize = 4096;

/// How latents become `x_start`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FixedOptions {
    /// Seed of the posterior samples.
    pub seed: u64,
    /// What latents are multiplied by; see [`LatentDataset::scaling_factor`].
    pub scaling_factor: f64,
    /// Labels must lie in `0..num_classes`.
    pub num_classes: usize,
}

/// Rows in memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FixedRows {
    /// Data set row numbers.
    pub rows: Vec<u64>,
    /// Latents `[rows, latent_shape…]`, scaled.
    pub x_start: Vec<f32>,
    /// Classes `[rows]`.
    pub labels: Vec<i64>,
}

impl LatentDataset {
    /// Reads `rows`, each once, in this order. Never mirrored; where posteriors are stored, each row's sample depends on
    /// the seed and the row's number alone.
    ///
    /// # Errors
    /// If a row does not exist or cannot be read, or its label is no class.
    pub fn fixed_rows(&self, rows: &[u64], options: FixedOptions) -> Result<FixedRows, DataError> {
        self.require_one_shape("the held-out loss")?;
        self.require_labels("the held-out loss")?;
        let numel = self.latent_numel();
        let mut fixed = FixedRows { rows: rows.to_vec(), ..FixedRows::default() };
        fixed.x_start.reserve_exact(rows.len() * numel);
        let (mut x, mut logvar, mut eps) = (vec![0f32; numel], vec![0f32; numel], vec![0f32; numel]);
        for chunk in rows.chunks(ROWS_AT_ONCE) {
            let runs: Vec<RowRun> = chunk.iter().map(|&first_row| RowRun { first_row, rows: 1 }).collect();
            let block = self.io.block_on(self.read_runs(&runs, Want::All))?;
            self.check_labels(&block, Some(options.num_classes))?;
            for (index, &row) in chunk.iter().enumerate() {
                block.latent(0, index, &mut x);
                if self.meta().moments {
                    block.latent(1, index, &mut logvar);
                    fill_normal(Key::new(options.seed, Purpose::ValidationPosterior, row), &mut eps);
                    add_posterior_noise(&mut x, &logvar, &eps);
                }
                fixed.x_start.extend(x.iter().map(|x| x * options.scaling_factor as f32));
            }
            fixed.labels.extend(block.labels());
        }
        Ok(fixed)
    }
}

/// Turns posterior means into samples. Log-variances are clamped to −30..20 as in the VAE's own code.
pub(crate) fn add_posterior_noise(mean: &mut [f32], logvar: &[f32], eps: &[f32]) {
    for ((x, logvar), eps) in mean.iter_mut().zip(logvar).zip(eps) {
        *x += (0.5 * logvar.clamp(-30.0, 20.0)).exp() * eps;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{sample, samples, write};
    use crate::{Columns, WriterOptions};

    #[test]
    fn a_rows_sample_depends_on_seed_and_row_alone() {
        let folder = tempfile::tempdir().unwrap();
        let options = WriterOptions { row_group_rows: 16, num_classes: Some(10), ..WriterOptions::new(vec![1, 2, 2]) };
        write(&folder.path().join("a.parquet"), options.clone(), &samples(100, &options));
        let dataset = LatentDataset::open(folder.path().to_str().unwrap(), &Columns::default()).unwrap();
        let fixed = FixedOptions { seed: 3, scaling_factor: 0.5, num_classes: 10 };
        let all = dataset.fixed_rows(&(0..100).collect::<Vec<_>>(), fixed).unwrap();
        let some = dataset.fixed_rows(&[97, 5, 31], fixed).unwrap();
        assert_eq!((some.labels.as_slice(), some.rows.as_slice()), (&[7, 5, 1][..], &[97, 5, 31][..]));
        for (index, row) in [97, 5, 31].into_iter().enumerate() {
            let x = &some.x_start[index * 4..][..4];
            assert_eq!(x, &all.x_start[row * 4..][..4]);
            let written = sample(row, &options);
            let mut eps = [0f32; 4];
            fill_normal(Key::new(3, Purpose::ValidationPosterior, row as u64), &mut eps);
            let (mean, logvar) = (&written.latents[0], &written.latents[1]);
            for i in 0..4 {
                let expected = 0.5 * (mean[i] + (0.5 * logvar[i]).exp() * eps[i]);
                assert!((x[i] - expected).abs() <= 1e-5 * expected.abs().max(1.0), "{} {expected}", x[i]);
            }
        }
        let other = dataset.fixed_rows(&[5], FixedOptions { seed: 4, ..fixed }).unwrap();
        assert_ne!(other.x_start, some.x_start[4..8]);
        let error = dataset.fixed_rows(&[5], FixedOptions { num_classes: 5, ..fixed }).unwrap_err().to_string();
        assert!(error.contains("0..5") && error.contains("row 5"), "{error}");
    }
}
