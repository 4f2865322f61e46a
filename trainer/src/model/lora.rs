//! Low-rank adaptation: a linear layer computes with W + (alpha / rank)·B·A, and only the thin A and B are trained
//! (Hu et al. 2021, section 4.1). Works on the segments of any model, because it only changes the weights they see.

use super::derived::{Derived, SharedSegment};
use super::patterns::{ParamPatterns, PatternError};
use super::{Flow, Init, Model, ParamSpec, Probe, Segment, Weights};
use configs::LoraConfig;
use glob::Pattern;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tch::Tensor;

const A: &str = "lora_A.weight";
const B: &str = "lora_B.weight";

/// Adapters that a model cannot have, or tensors that are not those of an adapted model.
#[derive(Debug, thiserror::Error)]
pub enum LoraError {
    /// Targets without a layer.
    #[error("{}", .0.join("; "))]
    Targets(Vec<String>),
    /// `lora.also_train` without a parameter.
    #[error(transparent)]
    Patterns(#[from] PatternError),
    /// An adapter that does not belong to its base.
    #[error("`{name}`: {problem}")]
    Tensor {
        /// The adapter's tensor.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
}

/// Whether a parameter of this name belongs to an adapter.
pub fn is_adapter(name: &str) -> bool {
    name.ends_with(A) || name.ends_with(B)
}

/// `model` with adapters on the layers that `lora` targets. What is not an adapter and not in `lora.also_train` is frozen.
///
/// # Errors
/// Lists every target without a layer and every pattern without a parameter.
pub fn adapt(model: Arc<dyn Model>, lora: &LoraConfig) -> Result<Arc<dyn Model>, LoraError> {
    let targets = Targets::new(lora, &*model)?;
    let also_train = ParamPatterns::new("lora.also_train", &lora.also_train, &*model)?;
    let wrap = |segment: SharedSegment| {
        let params = segment.params();
        let full_name = |spec: &ParamSpec| format!("{}{}", segment.prefix(), spec.name);
        let adapted = params.iter().filter(|spec| targets.has(&full_name(spec), &spec.shape));
        let adapted = adapted.map(|spec| spec.name.clone()).collect();
        Box::new(Adapted {
            adapted,
            rank: lora.rank as i64,
            scale: lora.scale(),
            also_train: also_train.clone(),
            segment,
        }) as Box<dyn Segment>
    };
    Ok(Arc::new(Derived::new(model, wrap)))
}

/// The weights that get an adapter: matrices of layers whose path, or the end of it, is a target.
struct Targets(Vec<[Pattern; 2]>);

impl Targets {
    fn new(lora: &LoraConfig, model: &dyn Model) -> Result<Self, LoraError> {
        let params = model.named_params();
        let (mut targets, mut problems) = (Self(Vec::new()), Vec::new());
        for target in &lora.targets {
            let patterns = [format!("{target}.weight"), format!("*.{target}.weight")].map(|text| Pattern::new(&text));
            let [Ok(whole), Ok(end)] = patterns else {
                problems.push(format!("`lora.targets`: \"{target}\" is not a pattern"));
                continue;
            };
            let one = Self(vec![[whole, end]]);
            if params.iter().any(|(name, spec)| one.has(name, &spec.shape)) {
                targets.0.extend(one.0);
            } else {
                let layers = model.segments().iter().flat_map(|segment| segment.params());
                let layers = layers.filter_map(|spec| Some(format!("`{}`", matrix_layer(&spec.name, &spec.shape)?)));
                let layers: Vec<String> = layers.collect::<BTreeSet<_>>().into_iter().collect();
                problems.push(format!(
                    "`lora.targets`: \"{target}\" is no linear layer of this model; it has {}",
                    layers.join(", ")
                ));
            }
        }
        if problems.is_empty() { Ok(targets) } else { Err(LoraError::Targets(problems)) }
    }

    fn has(&self, name: &str, shape: &[i64]) -> bool {
        matrix_layer(name, shape).is_some() && self.0.iter().flatten().any(|pattern| pattern.matches(name))
    }
}

/// The layer that a matrix called `name` is the weight of.
fn matrix_layer<'n>(name: &'n str, shape: &[i64]) -> Option<&'n str> {
    name.strip_suffix(".weight").filter(|_| shape.len() == 2)
}

/// `blocks.0.attn.qkv.weight` → `blocks.0.attn.qkv.lora_A.weight`.
fn adapter_name(weight: &str, part: &str) -> String {
    format!("{}{part}", weight.strip_suffix("weight").unwrap_or(weight))
}

/// W + scale·B·A.
fn effective(weight: &Tensor, a: &Tensor, b: &Tensor, scale: f64) -> Tensor {
    weight + b.matmul(a) * scale
}

/// A segment with adapters.
struct Adapted {
    segment: SharedSegment,
    /// The weights with an adapter, by their names inside the segment.
    adapted: BTreeSet<String>,
    rank: i64,
    scale: f64,
    also_train: ParamPatterns,
}

impl Segment for Adapted {
    fn prefix(&self) -> &str {
        self.segment.prefix()
    }

    /// Those of the base, each adapted weight followed by its adapter: A as PEFT's (Kaiming-uniform with a = √5, that is
    /// uniform in ±1/√inputs), B zero, so that training starts from the base.
    fn params(&self) -> Vec<ParamSpec> {
        let mut params = Vec::new();
        for mut spec in self.segment.params() {
            spec.trainable &= self.also_train.matches(&format!("{}{}", self.prefix(), spec.name));
            let adapter = self.adapted.contains(&spec.name).then(|| {
                let (outputs, inputs) = (spec.shape[0], spec.shape[1]);
                let uniform = Init::Uniform { bound: 1.0 / (inputs as f64).sqrt() };
                let a = ParamSpec::new(&adapter_name(&spec.name, A), &[self.rank, inputs], uniform);
                let b = ParamSpec::new(&adapter_name(&spec.name, B), &[outputs, self.rank], Init::Zeros);
                [a, b].map(|adapter| ParamSpec { last_of_prefix: spec.last_of_prefix, ..adapter })
            });
            params.push(spec);
            params.extend(adapter.into_iter().flatten());
        }
        params
    }

    fn forward(&self, weights: &Weights, input: &Flow, probe: Probe) -> Flow {
        let effective = |name: &String| {
            let (a, b) = (&weights[&adapter_name(name, A)], &weights[&adapter_name(name, B)]);
            (name.clone(), effective(&weights[name], a, b, self.scale))
        };
        self.segment.forward(&weights.with(self.adapted.iter().map(effective)), input, probe)
    }
}

/// The weights of the base model that computes what the adapted one does: every adapter is added to its weight. Tensors
/// without adapters are returned as they are.
///
/// # Errors
/// [`LoraError::Tensor`]: an adapter without its other half or its base, or of a shape that does not fit.
pub fn merge_lora(
    mut tensors: BTreeMap<String, Tensor>,
    lora: &LoraConfig,
) -> Result<BTreeMap<String, Tensor>, LoraError> {
    let adapters: Vec<String> = tensors.keys().filter(|name| is_adapter(name)).cloned().collect();
    let stems: BTreeSet<&str> = adapters.iter().filter_map(|name| Some(name.split_once("lora_")?.0)).collect();
    for stem in stems {
        let refuse = |name: &str, problem: String| LoraError::Tensor { name: name.to_owned(), problem };
        let mut take = |name: String| {
            tensors
                .remove(&name)
                .ok_or_else(|| refuse(&name, "is missing, but another tensor of its adapter is there".into()))
        };
        let weight_name = format!("{stem}weight");
        let (a, b) = (take(format!("{stem}{A}"))?, take(format!("{stem}{B}"))?);
        let weight = take(weight_name.clone())?;
        let fits = matches!((&a.size()[..], &b.size()[..], &weight.size()[..]),
            ([rank, inputs], [outputs, of_b], [rows, columns])
                if rank == of_b && (outputs, inputs) == (rows, columns) && *rank == lora.rank as i64);
        if !fits {
            let problem = format!(
                "has shape {:?}; its adapter of rank {} has {:?} and {:?}",
                weight.size(),
                lora.rank,
                a.size(),
                b.size()
            );
            return Err(refuse(&weight_name, problem));
        }
        tensors.insert(weight_name, tch::no_grad(|| effective(&weight, &a, &b, lora.scale())));
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;
    use crate::model::{WeightSet, initial_values, no_probe};
    use tch::{Device, Kind};

    fn lora(targets: &[&str], also_train: &[&str]) -> LoraConfig {
        let owned = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
        LoraConfig { rank: 3, alpha: 6.0, targets: owned(targets), also_train: owned(also_train) }
    }

    fn adapted(lora: &LoraConfig) -> Arc<dyn Model> {
        adapt(Arc::new(tiny_dit()), lora).unwrap()
    }

    /// All parameters with values of their own, zeros included.
    fn values(model: &dyn Model) -> BTreeMap<String, Tensor> {
        let value = |(name, spec): (String, ParamSpec)| {
            let values = initial_values(3, &name, &Init::Normal { std: 0.2 }, spec.numel());
            let tensor = Tensor::from_slice(&values).view(spec.shape.as_slice());
            (name, tensor)
        };
        model.named_params().into_iter().map(value).collect()
    }

    fn forward(model: &dyn Model, weights: &BTreeMap<String, Tensor>) -> Tensor {
        let weights = weights.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let weights = WeightSet::from_named(model, weights).unwrap();
        let x = Tensor::arange(2 * 4 * 64, (Kind::Float, Device::Cpu)).sin().view([2, 4, 8, 8]);
        let (t, y) = (Tensor::from_slice(&[3f32, 700.0]), Tensor::from_slice(&[1i64, 7]));
        tch::no_grad(|| weights.forward(model, &x, &t, &y, &mut no_probe))
    }

    #[test]
    fn adapters_have_pefts_names_shapes_and_first_values_and_everything_else_is_frozen() {
        let model = adapted(&lora(&["attn.qkv", "final_layer.linear"], &["y_embedder.*"]));
        let base: Vec<String> = tiny_dit().named_params().into_iter().map(|(name, _)| name).collect();
        let mut adapters = Vec::new();
        for (name, spec) in model.named_params() {
            if is_adapter(&name) {
                assert!(spec.trainable);
                adapters.push((name, spec));
            } else {
                assert!(base.contains(&name));
                assert_eq!(spec.trainable, name.starts_with("y_embedder."), "{name}");
            }
        }
        let names: Vec<&str> = adapters.iter().map(|(name, _)| name.as_str()).collect();
        let stems = ["blocks.0.attn.qkv", "blocks.1.attn.qkv", "final_layer.linear"];
        let expected: Vec<String> =
            stems.iter().flat_map(|stem| ["A", "B"].map(|part| format!("{stem}.lora_{part}.weight"))).collect();
        assert_eq!(names, expected);
        assert_eq!((&adapters[0].1.shape, &adapters[1].1.shape), (&vec![3, 36], &vec![108, 3]));
        let a = initial_values(1, names[0], &adapters[0].1.init, 3 * 36);
        let largest = a.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        assert!((0.15..=1.0 / 6.0).contains(&largest), "uniform in ±1/√36: {largest}");
        assert_eq!(adapters[1].1.init, Init::Zeros);
    }

    #[test]
    fn merged_weights_compute_what_the_adapted_model_does_and_fresh_adapters_change_nothing() {
        let lora = lora(&["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "t_embedder.mlp.*"], &[]);
        let (base, model) = (tiny_dit(), adapted(&lora));
        let mut weights = values(&*model);
        let with_adapters = forward(&*model, &weights);
        let copy = weights.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect();
        let merged = merge_lora(copy, &lora).unwrap();
        let difference = (forward(&base, &merged) - &with_adapters).abs().max().double_value(&[]);
        assert!(difference <= 1e-6, "{difference}");
        for (name, tensor) in &mut weights {
            if name.ends_with(B) {
                let _ = tensor.zero_();
            }
        }
        let fresh = forward(&*model, &weights);
        weights.retain(|name, _| !is_adapter(name));
        assert!(forward(&base, &weights).equal(&fresh) && !fresh.equal(&with_adapters));
    }

    #[test]
    fn targets_without_a_layer_and_halves_of_adapters_are_named() {
        let refusal = |lora: &LoraConfig| adapt(Arc::new(tiny_dit()), lora).map(|_| ()).unwrap_err().to_string();
        let said = refusal(&lora(&["attn.qkv", "attention.qkv", "x_embedder.proj"], &[]));
        assert!(said.contains("\"attention.qkv\" is no linear layer") && said.contains("`attn.qkv`"), "{said}");
        assert!(said.contains("\"x_embedder.proj\""), "a convolution is none: {said}");
        assert!(refusal(&lora(&["attn.qkv"], &["z_embedder.*"])).contains("`lora.also_train`: \"z_embedder.*\""));
        let lora = lora(&["attn.qkv"], &[]);
        let mut halves = values(&*adapted(&lora));
        halves.remove("blocks.1.attn.qkv.lora_B.weight");
        let said = merge_lora(halves, &lora).unwrap_err().to_string();
        assert!(said.starts_with("`blocks.1.attn.qkv.lora_B.weight`: is missing"), "{said}");
    }
}
