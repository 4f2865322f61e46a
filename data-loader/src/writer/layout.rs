//! What a part file says about itself and how its columns are laid out.

use std::collections::HashMap;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float16Array, Float32Array};
use arrow::buffer::Buffer;
use arrow::datatypes::{DataType, Field, FieldRef, Schema};
use half::bf16;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;

use super::PAGE_ROWS;
use crate::block::Numbers;
use crate::footer::{CAPTION_DTYPE, CAPTION_SHAPE, DTYPE, NUM_CLASSES, SCALING_FACTOR, SHAPE, VAE_DIGEST};
use crate::form::shape_numel;
use crate::{CaptionMeta, Columns, Dtype};

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
    /// The captions, where rows have them. They are stored in `caption_embedding`, in `caption_embedding_1` and so on where every row
    /// has the same number of several, with masks likewise.
    pub captions: Option<CaptionMeta>,
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
            captions: None,
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
        self.captions.map_or(Ok(()), |captions| captions.check())
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
        fields.extend(self.captions.iter().flat_map(CaptionMeta::fields));
        if self.labels {
            fields.push(Field::new(names.label, DataType::Int64, false));
        }
        fields.push(Field::new(names.id, DataType::Utf8, false));
        // Arrow readers look for keys in the embedded schema, others in the footer (`properties`).
        Arc::new(Schema::new_with_metadata(fields, self.keys().into_iter().collect::<HashMap<_, _>>()))
    }

    fn keys(&self) -> Vec<(String, String)> {
        let bf16_captions = self.captions.filter(|captions| captions.dtype == Dtype::Bf16);
        let shape = (!self.row_shapes).then(|| format!("{:?}", self.latent_shape).replace(' ', ""));
        let given = [
            (SHAPE, shape),
            (DTYPE, (self.dtype == Dtype::Bf16).then(|| self.dtype.to_string())),
            (CAPTION_SHAPE, self.captions.map(|captions| captions.shape())),
            (CAPTION_DTYPE, bf16_captions.map(|captions| captions.dtype.to_string())),
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
        let captions = self.captions.iter().flat_map(CaptionMeta::fields).map(|field| field.name().clone());
        for name in self.latent_columns().into_iter().chain(captions) {
            // Neither repeats, and nobody asks for their minimum.
            let path = ColumnPath::new(schema.field_with_name(&name).map_or_else(|_| vec![name.clone()], leaf_path));
            properties = properties
                .set_column_dictionary_enabled(path.clone(), false)
                .set_column_statistics_enabled(path, EnabledStatistics::None);
        }
        properties.build()
    }
}

/// The parquet path of the numbers in a column.
fn leaf_path(field: &Field) -> Vec<String> {
    let mut path = vec![field.name().clone()];
    let mut at = field.data_type();
    while let DataType::FixedSizeList(item, _) | DataType::List(item) = at {
        path.extend(["list".to_owned(), item.name().clone()]);
        at = item.data_type();
    }
    path
}

/// Numbers that parquet has lists of.
pub(super) fn numbers_array(numbers: Numbers) -> ArrayRef {
    match numbers {
        Numbers::F16(numbers) => Arc::new(Float16Array::from(numbers)),
        Numbers::F32(numbers) => Arc::new(Float32Array::from(numbers)),
        // As bytes, see `little_endian`.
        Numbers::Bf16(_) => unreachable!("parquet has no lists of bf16"),
    }
}

/// The bytes of numbers of which parquet has no list.
pub(super) fn little_endian(numbers: &[bf16]) -> Buffer {
    Buffer::from_vec(numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())
}

/// The item of a list of latent numbers.
pub(super) fn latent_item(dtype: Dtype) -> FieldRef {
    Arc::new(Field::new("element", if dtype == Dtype::F16 { DataType::Float16 } else { DataType::Float32 }, false))
}

/// The item of a list of dimensions.
pub(super) fn shape_item() -> FieldRef {
    Arc::new(Field::new("element", DataType::Int32, false))
}
