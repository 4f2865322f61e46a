//! The arguments that name a data set.

use anyhow::Context;
use clap::Args;
use data_loader::{Columns, LatentDataset};

/// Which data set, and what its columns are called.
#[derive(Args)]
pub struct Place {
    /// A .parquet file, a folder, or a URL (file://, s3://, gs://, az://, https://).
    url: String,
    #[command(flatten)]
    names: ColumnNames,
}

impl Place {
    /// Opens it.
    pub fn open(&self) -> anyhow::Result<LatentDataset> {
        Ok(LatentDataset::open(&self.url, &self.names.columns()?)?)
    }
}

/// What the columns of a data set are called.
#[derive(Args)]
pub struct ColumnNames {
    /// Name of a column, as `latent_mean=mu`; keys: latent, latent_mean, latent_logvar, latent_flipped, label, id, shape.
    #[arg(long = "column", value_name = "KEY=NAME")]
    columns: Vec<String>,
}

impl ColumnNames {
    /// The names, with the defaults for those that are not given.
    pub fn columns(&self) -> anyhow::Result<Columns> {
        let mut columns = Columns::default();
        for text in &self.columns {
            let (key, name) = text.split_once('=').with_context(|| format!("--column {text}: expected KEY=NAME"))?;
            let column = match key {
                "latent" => &mut columns.latent,
                "latent_mean" => &mut columns.latent_mean,
                "latent_logvar" => &mut columns.latent_logvar,
                "latent_flipped" => &mut columns.latent_flipped,
                "label" => &mut columns.label,
                "id" => &mut columns.id,
                "shape" => &mut columns.shape,
                _ => anyhow::bail!(
                    "--column {text}: unknown key `{key}`; expected latent, latent_mean, latent_logvar, latent_flipped, label, id or shape"
                ),
            };
            *column = name.to_owned();
        }
        Ok(columns)
    }
}
