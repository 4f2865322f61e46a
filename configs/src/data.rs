//! `[data]`: the data sets of a run and how their rows are read.

use serde::{Deserialize, Serialize};

use crate::schema::is_default;
use crate::urls::Urls;

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataConfig {
    /// Parquet files, folders of them, or names with ranges or wildcards; `None` with `mix`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<Urls>,
    /// Several data sets, mixed by weight; empty with `url`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub mix: Vec<DataSource>,
    /// Longest run of consecutive rows that is dealt to a lane as one piece; longer row groups are cut. At least 1.
    pub range_rows: u64,
    /// Rows of a lane that are shuffled among each other. At least 1.
    pub shuffle_window_rows: u64,
    /// Bound of the read-ahead buffer of one rank, in bytes. At least 1; one micro-batch is always held.
    pub prefetch_bytes: u64,
    /// Threads of one rank that read and decode, 1 to 256. Not part of the experiment: the rows are the same.
    pub threads: u64,
    /// Names of the columns in the parquet files.
    pub columns: Columns,
    /// Mirror with probability one half.
    pub flip: Flip,
    /// What becomes of a row group that cannot be used.
    #[serde(skip_serializing_if = "is_default")]
    pub on_broken: OnBroken,
    /// With [`OnBroken::Skip`], most rows that may lie in broken row groups. At least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_budget_rows: Option<u64>,
    /// Tokens that captions are padded or cut to, at least 1; `None`: captions are not read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub caption_tokens: Option<usize>,
    /// How often each of a row's captions is taken, over the sum; at least 0, one above. Empty: all equally often.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub caption_weights: Vec<f64>,
    /// Factor that stored latents are multiplied with; must equal the data set's metadata if that has one. Above 0.
    pub scaling_factor: Option<f64>,
}

/// `data.on_broken`: what becomes of a row group that cannot be decoded, or holds numbers that are not finite or labels that
/// are no classes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnBroken {
    /// The run stops when it gets there.
    #[default]
    Fail,
    /// Rows of sound row groups are read in place of its own, and the run says so.
    Skip,
}

/// `[[data.mix]]`: one of several data sets that rows are drawn from.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DataSource {
    /// Parquet files, folders of them, or names with ranges or wildcards; required.
    pub url: Urls,
    /// Its share of all rows over the sum of the weights. Above 0.
    pub weight: f64,
    /// Names of its columns; where not given those of `[data.columns]`.
    pub columns: Columns,
    /// In place of `data.scaling_factor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaling_factor: Option<f64>,
}

impl DataConfig {
    /// What rows are read from: `url`, or the sources of `mix` in their order.
    pub fn sources(&self) -> Vec<DataSource> {
        let (columns, scaling_factor) = (self.columns.clone(), self.scaling_factor);
        let alone = |url: &Urls| DataSource { url: url.clone(), weight: 1.0, columns, scaling_factor };
        self.url.as_ref().map_or_else(|| self.mix.clone(), |url| vec![alone(url)])
    }
}

/// `data.flip`: how an image is mirrored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flip {
    /// `false`: not at all.
    Never,
    /// `true`: by the latents of the mirrored image, which the files must have.
    Stored,
    /// `"latent"`: the latent itself, along its last dimension; right only as far as the VAE's latents of a mirrored image are
    /// the mirrored latents.
    Latent,
}

impl Serialize for Flip {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Flip::Never => serializer.serialize_bool(false),
            Flip::Stored => serializer.serialize_bool(true),
            Flip::Latent => serializer.serialize_str("latent"),
        }
    }
}

/// `[data.columns]`: names of the parquet columns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// Latents that are used as they are; moments win where a file has both.
    pub latent: String,
    /// Posterior means, where a posterior is stored instead.
    pub latent_mean: String,
    /// Posterior log-variances.
    pub latent_logvar: String,
    /// Mirrored latents, or with `_mean` and `_logvar` appended the mirrored posterior.
    pub latent_flipped: String,
    /// Class labels.
    pub label: String,
    /// Identity of the sample.
    pub id: String,
    /// Shape of the sample's latents, where rows have shapes of their own.
    #[serde(default = "shape_column", skip_serializing_if = "is_shape_column")]
    pub shape: String,
    /// Caption embeddings, or with `_1`, `_2` … appended several.
    #[serde(default = "caption_column", skip_serializing_if = "is_caption_column")]
    pub caption: String,
    /// Which tokens of the captions count, numbered as they are.
    #[serde(default = "caption_mask_column", skip_serializing_if = "is_caption_mask_column")]
    pub caption_mask: String,
}

fn shape_column() -> String {
    "shape".to_owned()
}

fn caption_column() -> String {
    "caption_embedding".to_owned()
}

fn is_caption_column(name: &String) -> bool {
    *name == caption_column()
}

fn caption_mask_column() -> String {
    "caption_mask".to_owned()
}

fn is_caption_mask_column(name: &String) -> bool {
    *name == caption_mask_column()
}

fn is_shape_column(name: &String) -> bool {
    *name == shape_column()
}

impl Default for Columns {
    fn default() -> Self {
        Columns {
            latent: "latent".to_owned(),
            latent_mean: "latent_mean".to_owned(),
            latent_logvar: "latent_logvar".to_owned(),
            latent_flipped: "latent_flipped".to_owned(),
            label: "label".to_owned(),
            id: "id".to_owned(),
            shape: shape_column(),
            caption: caption_column(),
            caption_mask: caption_mask_column(),
        }
    }
}

impl Columns {
    /// Column of the mirrored posterior means.
    pub fn flipped_mean(&self) -> String {
        format!("{}_mean", self.latent_flipped)
    }

    /// Column of the mirrored posterior log-variances.
    pub fn flipped_logvar(&self) -> String {
        format!("{}_logvar", self.latent_flipped)
    }
}
