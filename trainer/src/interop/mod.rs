//! Weights in and out: our checkpoints, `torch.save` files, safetensors files, diffusers folders.
//!
//! Names are always those of the official PyTorch state dict.

pub mod diffusers;
mod error;
pub mod file;
pub mod official;
pub mod origin;
pub mod run;
pub mod safetensors;
pub mod summary;
pub mod torch_file;
pub mod train_file;
pub mod values;

pub use error::InteropError;

use crate::model::dit::DitConfig;
use crate::model::lora::merge_lora;
use crate::recipe::Recipe;
use checkpoint::CheckpointReader;
use std::collections::BTreeMap;
use std::fmt;
use tch::Tensor;

/// The weights of a model by the names of the official state dict.
#[derive(Debug)]
pub struct NamedWeights {
    /// float32 on the CPU, in the parameter's shape.
    pub tensors: BTreeMap<String, Tensor>,
    /// The model's dimensions, where the source tells them.
    pub model: Option<DitConfig>,
}

/// Which weights of a source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum WeightsSection {
    /// The moving average: what one samples from.
    #[default]
    Ema,
    /// The weights as trained.
    Model,
    /// Another section of a checkpoint by its name.
    Named(String),
}

impl WeightsSection {
    /// The section's name in checkpoints, without the slash.
    pub fn name(&self) -> &str {
        match self {
            Self::Ema => "ema",
            Self::Model => "model",
            Self::Named(name) => name,
        }
    }
}

impl fmt::Display for WeightsSection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for WeightsSection {
    type Err = std::convert::Infallible;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Ok(match name {
            "ema" => Self::Ema,
            "model" => Self::Model,
            name => Self::Named(name.to_owned()),
        })
    }
}

/// Reads one section of weights from `source`: the URL of a run or checkpoint, the path of a `torch.save` or safetensors
/// file, or a diffusers folder. Where a file holds one set of weights only, it is taken whatever the section. Of a run with
/// adapters it gives the weights that they are merged into.
///
/// # Errors
/// Nothing of that kind there, a file that is damaged, or no such section.
pub fn read_weights(source: &str, section: WeightsSection) -> Result<NamedWeights, InteropError> {
    if let Some(folder) = configs::location::local_path(source).filter(|path| diffusers::is_folder(path)) {
        return diffusers::read(&folder);
    }
    match run::local_file(source) {
        Some(path) => official::read_weights(&*file::open(&path)?, &section),
        None => of_checkpoint(&run::reader(source)?, source, &section),
    }
}

/// `source` as it stays the same while others write: a run's URL becomes that of its newest valid checkpoint.
///
/// # Errors
/// No such run or checkpoint, or it is damaged.
pub fn pinned(source: &str) -> Result<String, InteropError> {
    let is_folder = configs::location::local_path(source).is_some_and(|path| diffusers::is_folder(&path));
    if is_folder || run::local_file(source).is_some() {
        return Ok(source.to_owned());
    }
    let (_, manifest) = run::open(source)?;
    let run = source.split_once(run::CHECKPOINTS).map_or(source, |(run, _)| run);
    Ok(format!("{}/{}", run.trim_end_matches('/'), manifest.key()))
}

/// One section of a checkpoint of ours, adapters added to their weights.
fn of_checkpoint(reader: &CheckpointReader, url: &str, section: &WeightsSection) -> Result<NamedWeights, InteropError> {
    let url = configs::location::redact(url);
    let recipe = Recipe::of_manifest(&reader.manifest().config);
    let recipe = recipe.map_err(|source| InteropError::Recipe { url: url.clone(), source: Box::new(source) })?;
    let prefix = format!("{section}/");
    let mut tensors = BTreeMap::new();
    for full_name in reader.names() {
        let Some(name) = full_name.strip_prefix(&prefix) else { continue };
        let shape = reader.shape(full_name).unwrap_or_default();
        tensors.insert(name.to_owned(), values::tensor(&reader.read_all_f32(full_name)?, shape)?);
    }
    if tensors.is_empty() {
        return Err(InteropError::NoSection {
            location: url,
            wanted: section.to_string(),
            available: sections(reader.names()),
        });
    }
    if let Some(lora) = &recipe.lora {
        let merged = merge_lora(tensors, lora);
        tensors = merged.map_err(|source| InteropError::Adapters { url, source })?;
    }
    Ok(NamedWeights { tensors, model: Some(recipe.model) })
}

/// The sections of names like `model/blocks.0.attn.qkv.weight`, each once, in order.
fn sections<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut sections: Vec<String> = names.filter_map(|name| Some(name.rsplit_once('/')?.0.to_owned())).collect();
    sections.sort();
    sections.dedup();
    sections
}
