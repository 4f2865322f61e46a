//! How the official scripts lay out their files: which tensors are the weights, whose optimizer state is whose, and what
//! the shapes tell about the model.

use super::file::TensorFile;
use super::values::{self, TensorSpec};
use super::{InteropError, NamedWeights, WeightsSection};
use crate::model::Model;
use crate::model::dit::{Conditioning, Dit, DitConfig};
use serde_json::Value;
use std::collections::BTreeMap;

/// What DistributedDataParallel and torch.compile put before parameter names.
const WRAPPERS: [&str; 2] = ["module.", "_orig_mod."];
/// Where some scripts put a state dict that has no average beside it.
const SINGLE: [&str; 3] = ["", "state_dict", "model_state_dict"];

/// The weights of a section: official name → name in the file. A file with one set of weights serves for both.
///
/// # Errors
/// [`InteropError::NoSection`]; two tensors of one name after the wrappers' prefixes are taken away.
pub fn section(file: &dyn TensorFile, section: &WeightsSection) -> Result<BTreeMap<String, String>, InteropError> {
    let of = |wanted: &str| -> Vec<(&str, &str)> {
        let in_section = |name| split(name).0 == wanted;
        file.tensors()
            .keys()
            .map(String::as_str)
            .filter(|name| in_section(name))
            .map(|name| (split(name).1, name))
            .collect()
    };
    let mut found = of(section.name());
    if found.is_empty() && !matches!(section, WeightsSection::Named(_)) {
        found = SINGLE.into_iter().map(of).find(|found| !found.is_empty()).unwrap_or_default();
    }
    if found.is_empty() {
        return Err(InteropError::NoSection {
            location: file.path().display().to_string(),
            wanted: section.to_string(),
            available: super::sections(file.tensors().keys().map(String::as_str)),
        });
    }
    let mut names = BTreeMap::new();
    for (mut name, in_file) in found {
        while let Some(inner) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
            name = inner;
        }
        if let Some(other) = names.insert(name.to_owned(), in_file.to_owned()) {
            let reason = format!("and `{other}` are both `{name}` without the prefixes of DDP and torch.compile");
            return Err(InteropError::Tensor { path: file.path().into(), tensor: in_file.to_owned(), reason });
        }
    }
    Ok(names)
}

/// Section (without the slash) and name of a tensor.
fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('/').unwrap_or(("", name))
}

/// Reads a section of a file.
///
/// # Errors
/// As [`section`]; damage.
pub(super) fn read_weights(file: &dyn TensorFile, wanted: &WeightsSection) -> Result<NamedWeights, InteropError> {
    let names = section(file, wanted)?;
    let shapes: BTreeMap<&str, &TensorSpec> =
        names.iter().map(|(name, in_file)| (name.as_str(), &file.tensors()[in_file])).collect();
    let total_bytes = shapes.values().fold(0usize, |sum, spec| sum.saturating_add(spec.bytes()));
    let file_bytes = std::fs::metadata(file.path()).map_err(InteropError::io(file.path(), "read"))?.len();
    if total_bytes as u64 > file_bytes {
        return Err(InteropError::Unsupported {
            path: file.path().into(),
            what: format!("its tensors have {total_bytes} bytes in a file of {file_bytes}: they share memory"),
            remedy: "save it with .clone() of every tensor".to_owned(),
        });
    }
    let model = infer(&shapes, file.about());
    let mut tensors = BTreeMap::new();
    for (name, in_file) in &names {
        tensors.insert(name.clone(), tensor(file, in_file)?);
    }
    Ok(NamedWeights { tensors, model })
}

/// One tensor of a file as float32.
///
/// # Errors
/// Damage; a dtype that holds no weights.
pub fn tensor(file: &dyn TensorFile, name: &str) -> Result<tch::Tensor, InteropError> {
    let raw = file.read(name)?;
    let of_tensor = |reason| InteropError::Tensor { path: file.path().into(), tensor: name.to_owned(), reason };
    values::tensor(&raw.to_f32().map_err(of_tensor)?, &raw.shape)
}

/// The dimensions of the DiT (adaLN-Zero) that has tensors of these names and shapes; `None` where they are of no DiT.
///
/// Shapes do not tell the number of heads and whether the label table has a row for dropped labels. `about` (the `args`
/// of train.py) does; without it the published sizes and the official code's extra row are taken for granted.
pub fn infer(tensors: &BTreeMap<&str, &TensorSpec>, about: &Value) -> Option<DitConfig> {
    // A file can say anything; the arithmetic below is safe for these sides.
    let sane = |spec: &&TensorSpec| spec.shape.iter().all(|side| (1..=1 << 20).contains(side));
    if !tensors.values().all(sane) {
        return None;
    }
    let shape = |name: &str| tensors.get(name).map(|spec| &spec.shape[..]);
    let &[1, tokens, hidden_size] = shape("pos_embed")? else { return None };
    let &[_, in_channels, patch_size, _] = shape("x_embedder.proj.weight")? else { return None };
    let &[rows, _] = shape("y_embedder.embedding_table.weight")? else { return None };
    let &[mlp_hidden, _] = shape("blocks.0.mlp.fc1.weight")? else { return None };
    let &[out, _] = shape("final_layer.linear.weight")? else { return None };
    let depth =
        (0..).take_while(|index| tensors.contains_key(format!("blocks.{index}.attn.qkv.weight").as_str())).count();
    let args = &about["args"];
    let num_classes = match args["num_classes"].as_u64() {
        Some(classes) if classes == rows as u64 || classes + 1 == rows as u64 => classes as usize,
        _ => rows.checked_sub(1)?,
    };
    // SiT's sizes are DiT's under another name.
    let named = args["model"].as_str().and_then(|name| configs::presets::by_name(&name.replace("SiT-", "DiT-")));
    let fits = |preset: &configs::presets::Preset| (preset.hidden_size, preset.depth) == (hidden_size, depth);
    let preset = named.into_iter().chain(configs::presets::ALL).find(fits)?;
    let config = DitConfig {
        input_size: (tokens.isqrt() * patch_size) as i64,
        in_channels: in_channels as i64,
        patch_size: patch_size as i64,
        hidden_size: hidden_size as i64,
        depth: depth as i64,
        num_heads: preset.num_heads as i64,
        mlp_ratio: mlp_hidden as f64 / hidden_size as f64,
        class_dropout_prob: if num_classes < rows { 0.1 } else { 0.0 },
        num_classes: num_classes as i64,
        learn_sigma: out == 2 * patch_size * patch_size * in_channels,
        conditioning: Conditioning::AdaLnZero,
        numerics: Default::default(),
    };
    let model = Dit::new(config.clone()).ok()?;
    let params = model.named_params();
    let as_declared = |(name, spec): &(String, crate::model::ParamSpec)| {
        shape(name).is_some_and(|shape| shape.iter().map(|&side| side as i64).eq(spec.shape.iter().copied()))
    };
    (params.len() == tensors.len() && params.iter().all(as_declared)).then_some(config)
}

#[cfg(test)]
mod tests {
    use super::super::safetensors;
    use super::super::values::Dtype;
    use super::*;
    use serde_json::json;
    use std::path::Path;

    /// A safetensors file of scalars with these names; its value is the position in the list.
    fn file_of(folder: &Path, names: &[&str]) -> String {
        let path = folder.join("weights.safetensors");
        let spec = |name: &&str| ((*name).to_owned(), TensorSpec { dtype: Dtype::F32, shape: vec![] });
        let value = |name: &str| names.iter().position(|other| *other == name).unwrap() as f32;
        safetensors::write(&path, &names.iter().map(spec).collect(), |name| Ok(value(name).to_le_bytes().into()))
            .unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn read(source: &str, section: WeightsSection) -> Vec<(String, f64)> {
        let weights = super::super::read_weights(source, section).unwrap();
        weights.tensors.into_iter().map(|(name, tensor)| (name, tensor.double_value(&[]))).collect()
    }

    fn named(pairs: &[(&str, f64)]) -> Vec<(String, f64)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    #[test]
    fn sections_are_found_and_wrappers_prefixes_taken_away() {
        let folder = tempfile::tempdir().unwrap();
        let both = file_of(folder.path(), &["ema/a.w", "model/module._orig_mod.a.w", "opt/state/0/exp_avg"]);
        assert_eq!(read(&both, WeightsSection::Ema), named(&[("a.w", 0.0)]));
        assert_eq!(read(&both, WeightsSection::Model), named(&[("a.w", 1.0)]));
        let error =
            super::super::read_weights(&both, WeightsSection::Named("slow".to_owned())).unwrap_err().to_string();
        assert!(error.contains("no `slow` weights; it has ema, model, opt/state/0"), "{error}");
        let bare = file_of(folder.path(), &["a.w", "_orig_mod.module.b"]);
        for section in [WeightsSection::Ema, WeightsSection::Model] {
            assert_eq!(read(&bare, section), named(&[("a.w", 0.0), ("b", 1.0)]));
        }
        let twice = file_of(folder.path(), &["module.a", "a"]);
        let error = super::super::read_weights(&twice, WeightsSection::Ema).unwrap_err().to_string();
        assert!(error.contains("both `a`"), "{error}");
        let one = file_of(folder.path(), &["state_dict/a"]);
        assert_eq!(read(&one, WeightsSection::Ema), named(&[("a", 0.0)]));
        let only = file_of(folder.path(), &["model/a"]);
        let error = super::super::read_weights(&only, WeightsSection::Ema).unwrap_err().to_string();
        assert!(error.contains("no `ema` weights; it has model"), "{error}");
    }

    fn inferred(config: &DitConfig, about: &Value) -> Option<DitConfig> {
        let params = Dit::new(config.clone()).unwrap().named_params();
        let spec = |spec: &crate::model::ParamSpec| TensorSpec {
            dtype: Dtype::F32,
            shape: spec.shape.iter().map(|&side| side as usize).collect(),
        };
        let specs: BTreeMap<String, TensorSpec> =
            params.iter().map(|(name, param)| (name.clone(), spec(param))).collect();
        infer(&specs.iter().map(|(name, spec)| (name.as_str(), spec)).collect(), about)
    }

    #[test]
    fn dimensions_come_from_shapes_the_published_sizes_and_the_args() {
        let config = DitConfig {
            input_size: 32,
            in_channels: 4,
            patch_size: 4,
            hidden_size: 384,
            depth: 12,
            num_heads: 6,
            mlp_ratio: 4.0,
            class_dropout_prob: 0.1,
            num_classes: 10,
            learn_sigma: true,
            conditioning: Conditioning::AdaLnZero,
            numerics: Default::default(),
        };
        assert_eq!(inferred(&config, &Value::Null), Some(config.clone()));
        let args = json!({"args": {"model": "SiT-S/4", "num_classes": 10}});
        assert_eq!(inferred(&config, &args), Some(config.clone()));
        let undropped = DitConfig { class_dropout_prob: 0.0, num_classes: 11, ..config.clone() };
        assert_eq!(inferred(&undropped, &Value::Null), Some(config.clone()), "the official code's extra row");
        assert_eq!(inferred(&undropped, &json!({"args": {"num_classes": 11}})), Some(undropped));
        let plain = DitConfig { learn_sigma: false, mlp_ratio: 2.0, in_channels: 16, ..config.clone() };
        assert_eq!(inferred(&plain, &Value::Null), Some(plain));
        assert_eq!(
            inferred(&DitConfig { depth: 3, ..config }, &Value::Null),
            None,
            "no published size: the heads are open"
        );
    }
}
