//! Weights out of a diffusers folder.

use super::config::TransformerConfig;
use super::{DiffusersError, names};
use crate::interop::{InteropError, NamedWeights, WeightsSection, file, official};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tch::Tensor;

/// Weight files in order of preference; `.index.json` ones list shards.
const WEIGHTS: [&str; 8] = [
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.safetensors.index.bf16.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
];

/// Whether `folder` looks like one that [`read`] takes.
pub fn is_folder(folder: &Path) -> bool {
    transformer_folder(folder).is_ok()
}

/// The weights of a `DiTTransformer2DModel` in a transformer or pipeline folder, under their official names.
///
/// Unless the folder was written by this module, the model gets the official code's [`Numerics`](crate::model::dit::Numerics),
/// whatever `norm_eps` says: the
/// published folders hold converted official weights. For weights that were trained in stock diffusers set
/// [`STOCK_DIFFUSERS`](crate::model::dit::Numerics::STOCK_DIFFUSERS) in the result.
///
/// # Errors
/// A folder that is no DiT's, a config that is not one, or weights that do not fit it.
pub fn read(folder: &Path) -> Result<NamedWeights, InteropError> {
    let folder = transformer_folder(folder)?;
    let config = TransformerConfig::load(&folder.join("config.json"))?;
    let present = WEIGHTS.iter().map(|name| folder.join(name)).find(|path| path.exists());
    let Some(path) = present else {
        let reason = "no diffusion_pytorch_model.safetensors (nor .fp16., .bf16., .bin or sharded) in it".to_owned();
        return Err(DiffusersError::Folder { path: folder, reason }.into());
    };
    let tensors = if path.extension().is_some_and(|extension| extension == "json") {
        read_shards(&path)?
    } else {
        read_file(&path)?
    };
    let (tensors, model) = names::from_diffusers(tensors, &config, &path.display().to_string())?;
    Ok(NamedWeights { tensors, model: Some(model) })
}

/// The folder with the transformer's config.json.
fn transformer_folder(folder: &Path) -> Result<PathBuf, DiffusersError> {
    let below = folder.join("transformer");
    if folder.join("model_index.json").exists() {
        return match below.join("config.json").exists() {
            true => Ok(below),
            false => Err(DiffusersError::Folder {
                path: folder.to_owned(),
                reason: "no transformer/config.json in it".to_owned(),
            }),
        };
    }
    match [folder, &below].into_iter().find(|folder| folder.join("config.json").exists()) {
        Some(found) => Ok(found.to_owned()),
        None => Err(DiffusersError::Folder { path: folder.to_owned(), reason: "no config.json in it".to_owned() }),
    }
}

/// `*.index.json`: which shard has which tensor.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn read_shards(path: &Path) -> Result<BTreeMap<String, Tensor>, InteropError> {
    let damaged = |reason: String| InteropError::Malformed { path: path.to_owned(), format: "index.json", reason };
    let text = std::fs::read_to_string(path).map_err(InteropError::io(path, "read"))?;
    let index: Index = serde_json::from_str(&text).map_err(|error| damaged(format!("no index of shards ({error})")))?;
    let shards: BTreeSet<&String> = index.weight_map.values().collect();
    let mut tensors = BTreeMap::new();
    for shard in shards {
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            return Err(damaged(format!("the shard {shard:?} is not the name of a file in the same folder")));
        }
        for (name, tensor) in read_file(&path.with_file_name(shard))? {
            match index.weight_map.get(&name) {
                Some(owner) if owner == shard => drop(tensors.insert(name, tensor)),
                Some(owner) => return Err(damaged(format!("`{name}` is in {shard}, expected it in {owner}"))),
                None => return Err(damaged(format!("`{name}` in {shard} is not in the index"))),
            }
        }
    }
    match index.weight_map.iter().find(|(name, _)| !tensors.contains_key(*name)) {
        Some((name, shard)) => Err(damaged(format!("`{name}` should be in {shard} and is not"))),
        None => Ok(tensors),
    }
}

/// Float32, CPU.
fn read_file(path: &Path) -> Result<BTreeMap<String, Tensor>, InteropError> {
    Ok(official::read_weights(&*file::open(path)?, &WeightsSection::Ema)?.tensors)
}
