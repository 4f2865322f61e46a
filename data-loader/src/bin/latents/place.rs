//! The arguments that name a data set.

use clap::Args;
use data_loader::{Columns, DataError, LatentDataset};

/// Which data set, and what its columns are called.
#[derive(Args)]
pub struct Place {
    /// A .parquet file, a folder, or a URL (file://, s3://, gs://, az://, https://).
    url: String,
    #[command(flatten)]
    names: ColumnNames,
}

impl Place {
    /// What was typed, without secrets.
    pub fn url(&self) -> String {
        configs::location::redact(&self.url)
    }

    /// Opens what is sound of it, and tells what is not.
    pub fn open_sound(&self) -> anyhow::Result<(LatentDataset, Vec<DataError>)> {
        Ok(LatentDataset::open_sound(&self.url, &self.names.columns()?)?)
    }

    /// Opens it.
    pub fn open(&self) -> anyhow::Result<LatentDataset> {
        Ok(LatentDataset::open(&self.url, &self.names.columns()?)?)
    }
}

/// What the columns of a data set are called.
#[derive(Args)]
pub struct ColumnNames {
    /// Name of a column, as `latent_mean=mu`; keys: latent, latent_mean, latent_logvar, latent_flipped, label, id, shape, caption, caption_mask.
    #[arg(long = "column", value_name = "KEY=NAME")]
    columns: Vec<String>,
}

impl ColumnNames {
    /// The names, with the defaults for those that are not given.
    pub fn columns(&self) -> anyhow::Result<Columns> {
        Columns::from_pairs(&self.columns).map_err(anyhow::Error::msg)
    }
}
