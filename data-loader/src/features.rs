//! What Hugging Face `datasets` says about the columns of a file that it has written.

use std::fmt;

use parquet::arrow::arrow_reader::ArrowReaderMetadata;
use serde_json::Value;

use crate::form::is_template;

/// The metadata key of `datasets`.
const KEY: &str = "huggingface";

/// What the features tell; nothing, if the file is not of `datasets`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features {
    /// Of an `Array3D` and the like; `None` for a dimension that differs from row to row.
    pub shape: Option<Vec<Option<usize>>>,
    /// Of the captions' array.
    pub caption_shape: Option<Vec<Option<usize>>>,
    /// Names of a `ClassLabel`.
    pub num_classes: Option<usize>,
}

impl Features {
    /// Of the two columns. What is not as `datasets` writes it says nothing.
    pub fn of(metadata: &ArrowReaderMetadata, latent: &str, label: &str, caption: &str) -> Self {
        let text = metadata.schema().metadata().get(KEY);
        text.and_then(|text| serde_json::from_str(text).ok())
            .map_or_else(Self::default, |json: Value| Self::of_json(&json["info"]["features"], latent, label, caption))
    }

    fn of_json(features: &Value, latent: &str, label: &str, caption: &str) -> Self {
        let kind = |feature: &Value| feature["_type"].as_str().unwrap_or_default().to_owned();
        let dim = |dim: &Value| match dim {
            Value::Null => Some(None),
            dim => usize::try_from(dim.as_u64()?).ok().map(Some),
        };
        let shape = |feature: &Value| -> Option<Vec<Option<usize>>> {
            let dims = feature["shape"].as_array().filter(|_| kind(feature).starts_with("Array"))?;
            dims.iter().map(dim).collect::<Option<Vec<_>>>().filter(|dims| is_template(dims))
        };
        let label = &features[label];
        let names = label["names"].as_array().filter(|_| kind(label) == "ClassLabel");
        Self {
            shape: shape(&features[latent]),
            caption_shape: shape(&features[caption]).filter(|dims| (2..=3).contains(&dims.len())),
            num_classes: names.map(Vec::len).filter(|classes| *classes > 0),
        }
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.shape {
            Some(dims) => write!(f, "an array of shape {}", crate::shapes::template_text(dims))?,
            None => f.write_str("without a shape")?,
        }
        if let Some(dims) = &self.caption_shape {
            write!(f, ", captions of shape {}", crate::shapes::template_text(dims))?;
        }
        match self.num_classes {
            Some(classes) => write!(f, ", {classes} class names"),
            None => f.write_str(", without class names"),
        }
    }
}
