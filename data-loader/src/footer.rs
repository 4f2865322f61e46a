//! Footers: what one file says about itself, and what a data set's files must agree on.

use std::collections::BTreeMap;

use arrow::datatypes::DataType;
use futures::FutureExt;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions};
use parquet::file::metadata::PageIndexPolicy;

use crate::Columns;
use crate::DataError;
use crate::access::out_of_parquet;
use crate::bounds::check_row_groups;
use crate::captions::{self, CaptionColumns};
use crate::features::Features;
use crate::form::{Dtype, Form, READABLE, is_template};
use crate::source::{ObjectReader, SourceFile, partition};

pub(crate) const SHAPE: &str = "ditharos.latent_shape";
pub(crate) const SCALING_FACTOR: &str = "ditharos.scaling_factor";
pub(crate) const NUM_CLASSES: &str = "ditharos.num_classes";
pub(crate) const VAE_DIGEST: &str = "ditharos.vae_digest";
/// Number type of latents in binary columns; without it, two bytes a number are f16 and four are f32.
pub(crate) const DTYPE: &str = "ditharos.latent_dtype";
/// `[tokens, dim]` or `[captions, tokens, dim]`; `null` where it differs.
pub(crate) const CAPTION_SHAPE: &str = "ditharos.caption_shape";
/// Number type of captions in binary columns; f16 without it.
pub(crate) const CAPTION_DTYPE: &str = "ditharos.caption_dtype";
const PANDAS_ATTRS: &str = "PANDAS_ATTRS";
const KEYS: [&str; 7] = [SHAPE, SCALING_FACTOR, NUM_CLASSES, VAE_DIGEST, DTYPE, CAPTION_SHAPE, CAPTION_DTYPE];

/// Where the labels of a file come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Label {
    Column,
    /// The folder: all rows have this one.
    Folder(i64),
    /// Nowhere.
    Absent,
}

/// The footer of one file.
pub(crate) struct Footer {
    pub file: SourceFile,
    pub metadata: ArrowReaderMetadata,
    /// The `ditharos.*` keys.
    pub keys: BTreeMap<&'static str, String>,
    /// What Hugging Face `datasets` says.
    pub features: Features,
    /// Where labels come from.
    pub label: Label,
    /// The latent columns, in the order of `RowBlock`: value or mean, log-variance, then the mirrored ones.
    pub latents: Vec<(String, Form)>,
    pub moments: bool,
    pub flipped: bool,
    /// The caption columns, and those of their masks.
    pub captions: Vec<(String, Form)>,
    pub caption_masks: Vec<String>,
    /// Whether there is a column of shapes, see [`Columns::shape`].
    pub has_shape_column: bool,
}

impl Footer {
    /// Reads and checks the footer of a file.
    pub async fn read(file: SourceFile, columns: &Columns) -> Result<Self, DataError> {
        let damaged =
            |reason: String| DataError::Damaged { file: file.name.clone(), file_bytes: file.file_bytes, reason };
        let mut reader = ObjectReader(file.clone());
        // Offset indexes let a row range fetch only its own pages; files without them are read by whole column chunks.
        let options = ArrowReaderOptions::new().with_offset_index_policy(PageIndexPolicy::Optional);
        let metadata = std::panic::AssertUnwindSafe(ArrowReaderMetadata::load_async(&mut reader, options))
            .catch_unwind()
            .await
            .map_err(|payload| DataError::panicked(&file.name, &*payload))?
            .map_err(|error| out_of_parquet(error, &file.name, damaged))?;
        for (index, group) in metadata.metadata().row_groups().iter().enumerate() {
            if group.num_rows() < 0 {
                return Err(damaged(format!("row group {index} claims {} rows", group.num_rows())));
            }
            for column in group.columns() {
                let start = column.dictionary_page_offset().unwrap_or(column.data_page_offset());
                let end = start.checked_add(column.compressed_size());
                if start < 0 || column.compressed_size() < 0 || end.is_none_or(|end| end as u64 > file.file_bytes) {
                    return Err(damaged(format!(
                        "column {} of row group {index} lies outside of the file",
                        column.column_path()
                    )));
                }
            }
        }
        let (latents, label) =
            (latent_columns(&file.name, &metadata, columns), label(&file, &metadata, &columns.label));
        let captions = caption_columns(&file.name, &metadata, columns);
        let (latents, label, (captions, caption_masks)) = match (latents, label, captions) {
            (Ok(latents), Ok(label), Ok(captions)) => (latents, label, captions),
            (latents, label, captions) => {
                let errors = [latents.err(), label.err(), captions.err()];
                return Err(DataError::some(errors.into_iter().flatten().collect()));
            }
        };
        let (latents, moments, flipped) = latents;
        let (keys, features) =
            (keys(&metadata), Features::of(&metadata, &latents[0].0, &columns.label, &columns.caption));
        let has_shape_column = is_shape_column(&metadata, &columns.shape);
        let footer = Self {
            file,
            metadata,
            keys,
            features,
            label,
            latents,
            moments,
            flipped,
            captions,
            caption_masks,
            has_shape_column,
        };
        check_row_groups(&footer, 0)?;
        Ok(footer)
    }

    /// An error about a row of the file's first row group.
    pub fn row_error(&self, row: u64, column: &str, found: String, expected: String) -> DataError {
        DataError::Row {
            file: self.file.name.clone(),
            row_group: 0,
            row_in_file: row,
            column: column.to_owned(),
            found,
            expected,
        }
    }

    /// Checks that this file can stand in one data set with the `first` one.
    pub fn agrees_with(&self, first: &Footer) -> Result<(), DataError> {
        let differs = |key: String, found: String, expected: String| {
            Err(DataError::Disagreement {
                file: self.file.name.clone(),
                key,
                found,
                first_file: first.file.name.clone(),
                expected,
            })
        };
        let names =
            |footer: &Footer| footer.latents.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        if names(self) != names(first) {
            return differs("the set of latent columns".into(), names(self), names(first));
        }
        for ((name, form), (_, expected)) in self.latents.iter().zip(&first.latents) {
            if form != expected {
                return differs(format!("column `{name}`"), form.to_string(), expected.to_string());
            }
        }
        if self.has_shape_column != first.has_shape_column {
            let text = |footer: &Footer| if footer.has_shape_column { "present" } else { "absent" }.to_owned();
            return differs("the column of shapes".into(), text(self), text(first));
        }
        if (self.label == Label::Absent) != (first.label == Label::Absent) {
            let text = |footer: &Footer| if footer.label == Label::Absent { "absent" } else { "present" }.to_owned();
            return differs("the label".into(), text(self), text(first));
        }
        if self.features != first.features {
            return differs("metadata key `huggingface`".into(), self.features.to_string(), first.features.to_string());
        }
        if (&self.captions, &self.caption_masks) != (&first.captions, &first.caption_masks) {
            let text = |footer: &Footer| {
                let columns = footer.captions.iter().map(|(name, form)| format!("`{name}` ({form})"));
                let columns: Vec<String> =
                    columns.chain(footer.caption_masks.iter().map(|name| format!("`{name}`"))).collect();
                if columns.is_empty() { "empty".to_owned() } else { columns.join(", ") }
            };
            return differs("the set of caption columns".into(), text(self), text(first));
        }
        for key in KEYS {
            let value =
                |footer: &Footer| footer.keys.get(key).map_or("absent".to_owned(), |value| format!("`{value}`"));
            if self.keys.get(key) != first.keys.get(key) {
                return differs(format!("metadata key `{key}`"), value(self), value(first));
            }
        }
        Ok(())
    }

    fn bad_key(&self, key: &str, expected: &str) -> DataError {
        let found = self.keys.get(key).map_or("", String::as_str);
        DataError::Metadata {
            file: self.file.name.clone(),
            key: key.into(),
            reason: format!("found `{found}`; expected {expected}"),
        }
    }

    /// What is wrong with the values of keys.
    pub fn bad_keys(&self) -> Vec<DataError> {
        let errors = [
            self.shape().err(),
            self.dtype().err(),
            self.scaling_factor().err(),
            self.num_classes().err(),
            self.caption_shape().err(),
            self.caption_dtype().err(),
        ];
        errors.into_iter().flatten().collect()
    }

    /// `ditharos.latent_shape`, if given; `None` for dimensions that differ from row to row.
    pub fn shape(&self) -> Result<Option<Vec<Option<usize>>>, DataError> {
        let Some(text) = self.keys.get(SHAPE) else {
            return Ok(self.features.shape.clone());
        };
        serde_json::from_str::<Vec<Option<usize>>>(text).ok().filter(|dims| is_template(dims)).map(Some).ok_or_else(|| {
            self.bad_key(
                SHAPE,
                "a JSON array of positive numbers such as [4,32,32], at most 2^28 in all, with null for a dimension that differs from row to row",
            )
        })
    }

    /// `ditharos.latent_dtype`, if given.
    pub fn dtype(&self) -> Result<Option<Dtype>, DataError> {
        self.dtype_of(DTYPE)
    }

    /// `ditharos.caption_dtype`, if given.
    pub fn caption_dtype(&self) -> Result<Option<Dtype>, DataError> {
        self.dtype_of(CAPTION_DTYPE)
    }

    fn dtype_of(&self, key: &'static str) -> Result<Option<Dtype>, DataError> {
        let Some(text) = self.keys.get(key) else {
            return Ok(None);
        };
        Dtype::parse(text.trim_matches('"')).map(Some).ok_or_else(|| self.bad_key(key, "f16, bf16 or f32"))
    }

    /// `ditharos.caption_shape`, if given.
    pub fn caption_shape(&self) -> Result<Option<Vec<Option<usize>>>, DataError> {
        let Some(text) = self.keys.get(CAPTION_SHAPE) else {
            return Ok(self.features.caption_shape.clone());
        };
        let fits = |dims: &Vec<Option<usize>>| (2..=3).contains(&dims.len()) && is_template(dims);
        serde_json::from_str::<Vec<Option<usize>>>(text).ok().filter(fits).map(Some).ok_or_else(|| {
            self.bad_key(
                CAPTION_SHAPE,
                "[tokens, dim] or [captions, tokens, dim], with null for what differs from row to row",
            )
        })
    }

    /// `ditharos.scaling_factor`, if given.
    pub fn scaling_factor(&self) -> Result<Option<f64>, DataError> {
        let Some(text) = self.keys.get(SCALING_FACTOR) else {
            return Ok(None);
        };
        let factor = text.trim().parse::<f64>().ok().filter(|factor| factor.is_finite() && *factor > 0.0);
        factor.map(Some).ok_or_else(|| self.bad_key(SCALING_FACTOR, "a positive number"))
    }

    /// `ditharos.num_classes`, if given.
    pub fn num_classes(&self) -> Result<Option<usize>, DataError> {
        let Some(text) = self.keys.get(NUM_CLASSES) else {
            return Ok(self.features.num_classes);
        };
        let classes = text.trim().parse::<usize>().ok().filter(|classes| *classes > 0);
        classes.map(Some).ok_or_else(|| self.bad_key(NUM_CLASSES, "a positive whole number"))
    }
}

/// The keys of the footer, those that a writer put into the embedded arrow schema instead, and those that pandas keeps for
/// `DataFrame.attrs`.
fn keys(metadata: &ArrowReaderMetadata) -> BTreeMap<&'static str, String> {
    let found = metadata.schema().metadata();
    let attrs: Option<serde_json::Value> = found.get(PANDAS_ATTRS).and_then(|text| serde_json::from_str(text).ok());
    let of_pandas = |key: &str| match attrs.as_ref()?.get(key)? {
        serde_json::Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    KEYS.iter().filter_map(|key| Some((*key, found.get(key).cloned().or_else(|| of_pandas(key))?))).collect()
}

type LatentColumns = (Vec<(String, Form)>, bool, bool);

fn latent_columns(file: &str, metadata: &ArrowReaderMetadata, columns: &Columns) -> Result<LatentColumns, DataError> {
    let schema = metadata.schema();
    let has = |name: &str| schema.column_with_name(name).is_some();
    let moments = has(&columns.latent_mean) && has(&columns.latent_logvar);
    if !moments && !has(&columns.latent) {
        return Err(missing(
            file,
            metadata,
            format!("`{}`, nor `{}` with `{}`", columns.latent, columns.latent_mean, columns.latent_logvar),
        ));
    }
    let mut names = if moments {
        vec![columns.latent_mean.clone(), columns.latent_logvar.clone()]
    } else {
        vec![columns.latent.clone()]
    };
    let mirrored = if moments {
        vec![columns.flipped_mean(), columns.flipped_logvar()]
    } else {
        vec![columns.latent_flipped.clone()]
    };
    let flipped = mirrored.iter().all(|name| has(name));
    if flipped {
        names.extend(mirrored);
    }
    let latents = names
        .into_iter()
        .map(|name| form_of(file, metadata, &name).map(|form| (name, form)))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((latents, moments, flipped))
}

fn caption_columns(file: &str, metadata: &ArrowReaderMetadata, columns: &Columns) -> Result<CaptionColumns, DataError> {
    let schema = metadata.schema();
    let form = |name: &str| form_of(file, metadata, name);
    captions::find(&columns.caption, &columns.caption_mask, |name| schema.column_with_name(name).is_some(), form)
}

fn form_of(file: &str, metadata: &ArrowReaderMetadata, name: &str) -> Result<Form, DataError> {
    let field = metadata.schema().field_with_name(name);
    let found = field.map(|field| field.data_type().clone()).unwrap_or(DataType::Null);
    Form::of(&found).ok_or_else(|| DataError::ColumnType {
        file: file.into(),
        column: name.into(),
        found: found.to_string(),
        expected: READABLE.into(),
    })
}

fn label(file: &SourceFile, metadata: &ArrowReaderMetadata, name: &str) -> Result<Label, DataError> {
    let wrong = |found: String, expected: &str| {
        let (file, column, expected) = (file.name.clone(), name.to_owned(), expected.to_owned());
        Err(DataError::ColumnType { file, column, found, expected })
    };
    let Some((_, field)) = metadata.schema().column_with_name(name) else {
        return match partition(&file.path, name) {
            None => Ok(Label::Absent),
            Some(text) => match text.parse() {
                Ok(label) => Ok(Label::Folder(label)),
                Err(_) => wrong(format!("`{text}` in the name of its folder"), "an integer"),
            },
        };
    };
    let values = match field.data_type() {
        DataType::Dictionary(_, values) => values,
        plain => plain,
    };
    if values.is_integer() {
        return Ok(Label::Column);
    }
    wrong(field.data_type().to_string(), "an integer (plain or dictionary-encoded)")
}

/// Whether `name` is a column of integer lists.
fn is_shape_column(metadata: &ArrowReaderMetadata, name: &str) -> bool {
    match metadata.schema().column_with_name(name).map(|(_, field)| field.data_type()) {
        Some(
            DataType::List(item)
            | DataType::LargeList(item)
            | DataType::FixedSizeList(item, _)
            | DataType::ListView(item)
            | DataType::LargeListView(item),
        ) => item.data_type().is_integer(),
        _ => false,
    }
}

pub(crate) fn missing(file: &str, metadata: &ArrowReaderMetadata, wanted: String) -> DataError {
    let found = metadata.schema().fields().iter().map(|field| format!("`{}`", field.name())).collect();
    DataError::MissingColumn { file: file.into(), wanted, found }
}
