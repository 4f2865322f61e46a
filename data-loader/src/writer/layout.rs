//! What a part file says about itself and how its columns are laid out.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::PAGE_ROWS;
use crate::footer::{DTYPE, NUM_CLASSES, SCALING_FACTOR, SHAPE, VAE_DIGEST};
use crate::form::shape_numel;
use crate::{Columns, Dtype};

const PAGE_BYTES: usize = 4 << 20;

/// What a part file says and how it is laid out.
#[derive(Clone, Debug, PartialEq)]
pub struct WriterOptions {
    /// Shape of one latent: `[channels, height, width]`, `[channels, frames, height, width]` of videos.
    pub latent_shape: Vec<usize>,
    /// Whether each row has a shape of its own instead, in a column `shape`.
    pub row_shapes: bool,
    /// Whether posterior moments are stored, not latents.
    pub moments: bool,
    /// Whether each row also has the latent (or moments) of the mirrored image.
    pub flipped: bool,
    /// Whether each row has a class.
    pub labels: bool,
    /// What a reader must multiply latents by.
    pub scaling_factor: Option<f64>,
    /// Labels lie in `0..num_classes`.
    pub num_classes: Option<usize>,
    /// Digest of the VAE.
    pub vae_digest: Option<String>,
    /// Further key-value metadata.
    pub metadata: Vec<(String, String)>,
    /// The number type. f16 and f32 become lists, bf16, of which parquet has no list, binary values.
    pub dtype: Dtype,
    /// Rows of a row group.
    pub row_group_rows: usize,
    /// Compress with zstd. Latents are mostly noise, so this saves little and costs reading speed.
    pub zstd: bool,
}

impl WriterOptions {
    /// Moments in f16 with labels, not mirrored, row groups of 4,096 rows, no compression.
    pub fn new(latent_shape: Vec<usize>) -> Self {
        Self {
            latent_shape,
            row_shapes: false,
            moments: true,
            flipped: false,
            labels: true,
            scaling_factor: None,
            num_classes: None,
            vae_digest: None,
            metadata: Vec::new(),
            dtype: Dtype::F16,
            row_group_rows: 4096,
            zstd: false,
        }
    }

    /// Names of the latent columns, in the order in which rows give them: the latent, or mean and log-variance; then the
    /// same of the mirrored image.
    pub fn latent_columns(&self) -> Vec<String> {
        let columns = Columns::default();
        let (flipped_mean, flipped_logvar) = (columns.flipped_mean(), columns.flipped_logvar());
        let (straight, mirrored) = if self.moments {
            (vec![columns.latent_mean, columns.latent_logvar], vec![flipped_mean, flipped_logvar])
        } else {
            (vec![columns.latent], vec![columns.latent_flipped])
        };
        straight.into_iter().chain(if self.flipped { mirrored } else { Vec::new() }).collect()
    }

    /// The words of what makes no sense.
    pub(super) fn check(&self) -> Result<(), String> {
        if !self.row_shapes && shape_numel(&self.latent_shape).is_none() {
            return Err(format!(
                "latent shape {:?}; expected positive lengths, at most 2^28 numbers",
                self.latent_shape
            ));
        }
        if self.row_group_rows == 0 {
            return Err("row groups of 0 rows; expected at least 1".into());
        }
        Ok(())
    }

    /// Numbers in a latent; `check` has passed.
    pub(super) fn numel(&self) -> usize {
        self.latent_shape.iter().product()
    }

    pub(super) fn schema(&self) -> Arc<Schema> {
        let names = Columns::default();
        let latent_type = match (self.dtype, self.row_shapes) {
            (Dtype::Bf16, true) => DataType::Binary,
            // `check` has bounded the latent at 2^28 numbers.
            (Dtype::Bf16, false) => DataType::FixedSizeBinary(self.numel() as i32 * 2),
            (dtype, true) => DataType::List(latent_item(dtype)),
            (dtype, false) => DataType::FixedSizeList(latent_item(dtype), self.numel() as i32),
        };
        let mut fields: Vec<Field> =
            self.latent_columns().into_iter().map(|name| Field::new(name, latent_type.clone(), false)).collect();
        if self.row_shapes {
            fields.push(Field::new("shape", DataType::List(shape_item()), false));
        }
        if self.labels {
            fields.push(Field::new(names.label, DataType::Int64, false));
        }
        fields.push(Field::new(names.id, DataType::Utf8, false));
        // Arrow readers look for keys in the embedded schema, others in the footer (`properties`).
        Arc::new(Schema::new_with_metadata(fields, self.keys().into_iter().collect::<HashMap<_, _>>()))
    }

    fn keys(&self) -> Vec<(String, String)> {
        let shape = (!self.row_shapes).then(|| format!("{:?}", self.latent_shape).replace(' ', ""));
        let given = [
            (SHAPE, shape),
            (DTYPE, (self.dtype == Dtype::Bf16).then(|| self.dtype.to_string())),
            (SCALING_FACTOR, self.scaling_factor.map(|factor| factor.to_string())),
            (NUM_CLASSES, self.num_classes.map(|classes| classes.to_string())),
            (VAE_DIGEST, self.vae_digest.clone()),
        ];
        let given = given.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        given.chain(self.metadata.iter().cloned()).collect()
    }

    pub(super) fn properties(&self, schema: &Schema) -> WriterProperties {
        let keys = self.keys().into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
        let mut properties = WriterProperties::builder()
            .set_key_value_metadata(Some(keys))
            .set_max_row_group_row_count(Some(self.row_group_rows))
            .set_data_page_row_count_limit(PAGE_ROWS)
            .set_data_page_size_limit(PAGE_BYTES)
            .set_compression(if self.zstd {
                Compression::ZSTD(ZstdLevel::default())
            } else {
                Compression::UNCOMPRESSED
            });
        for name in self.latent_columns() {
            let path = match schema.field_with_name(&name).map(Field::data_type) {
                Ok(DataType::FixedSizeList(item, _) | DataType::List(item)) => {
                    vec![name, "list".into(), item.name().clone()]
                }
                _ => vec![name],
            };
            // Latents do not repeat, and nobody asks for their minimum.
            let path = ColumnPath::new(path);
            properties = properties
                .set_column_dictionary_enabled(path.clone(), false)
                .set_column_statistics_enabled(path, EnabledStatistics::None);
        }
        properties.build()
    }
}

/// The item of a list of latent numbers.
pub(super) fn latent_item(dtype: Dtype) -> FieldRef {
    Arc::new(Field::new("element", if dtype == Dtype::F16 { DataType::Float16 } else { DataType::Float32 }, false))
}

/// The item of a list of dimensions.
pub(super) fn shape_item() -> FieldRef {
    Arc::new(Field::new("element", DataType::Int32, false))
}
