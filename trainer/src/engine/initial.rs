//! The weights that a run starts with where `[init]` takes them from elsewhere.

use crate::interop::values::to_vec;
use crate::interop::{self, InteropError, NamedWeights};
use crate::model::dit::refit::Refit;
use crate::model::lora::is_adapter;
use crate::model::{Model, ParamSpec, initial_values};
use crate::recipe::Recipe;
use configs::{InitConfig, RunConfig};
use std::collections::HashMap;
use tch::Tensor;

/// Given weights; a parameter without one has its first values.
#[derive(Debug, Default)]
pub struct Initial {
    /// By full name, in the parameter's shape.
    pub tensors: HashMap<String, Tensor>,
    /// What is not as the source has it, for the log.
    pub changes: Vec<String>,
}

/// Why a run cannot start from the given weights.
#[derive(Debug, thiserror::Error)]
pub enum InitialError {
    /// The source cannot be read.
    #[error("`init.from`")]
    Source(#[from] InteropError),
    /// Everything that does not fit.
    #[error("`init.from`: {from} does not fit this run's model:\n  {}", .problems.join("\n  "))]
    Misfit {
        /// Redacted.
        from: String,
        /// One a tensor or dimension.
        problems: Vec<String>,
    },
    /// Adapters on nothing.
    #[error(
        "`lora`: there is nothing to adapt, because without [init] the frozen weights of a new run are random; set \
         init.from, or remove [lora]"
    )]
    AdaptersAlone,
}

impl Initial {
    /// What a new run starts with; `source` is the `init.from` of `config`, made definite ([`interop::pinned`]).
    ///
    /// # Errors
    /// [`InitialError`]; a misfit lists every tensor.
    pub fn of(
        config: &RunConfig,
        recipe: &Recipe,
        model: &dyn Model,
        source: Option<&str>,
    ) -> Result<Self, InitialError> {
        match (&config.init, source) {
            (Some(init), Some(source)) => {
                let Ok(section) = init.weights.parse();
                let weights = interop::read_weights(source, section)?;
                Self::fitted(weights, init, recipe, model, config.seed)
            }
            _ if recipe.lora.is_some() => Err(InitialError::AdaptersAlone),
            _ => Ok(Self::default()),
        }
    }

    fn fitted(
        weights: NamedWeights,
        init: &InitConfig,
        recipe: &Recipe,
        model: &dyn Model,
        seed: u64,
    ) -> Result<Self, InitialError> {
        let NamedWeights { tensors: mut found, model: from } = weights;
        let refit = Refit { from: from.as_ref(), to: &recipe.model, how: init };
        let (mut problems, mut initial) = (refit.contradictions(), Self::default());
        initial.changes = refit.remarks();
        for (name, spec) in model.named_params() {
            if is_adapter(&name) {
                continue;
            }
            let Some(tensor) = found.remove(&name) else {
                problems.push(format!("`{name}` {:?} is missing", spec.shape));
                continue;
            };
            if tensor.isfinite().all().int64_value(&[]) == 0 {
                problems.push(format!("`{name}` has values that are not finite"));
            }
            match refit.parameter(&name, tensor, &spec, &|| fresh(seed, &name, &spec)) {
                Err(problem) => problems.push(format!("`{name}` {problem}")),
                Ok((_, Some(change))) if change.untrained && !spec.trainable => problems.push(format!(
                    "`{name}`: {}, but it is frozen; train it (`train.freeze`, or with [lora] `lora.also_train`)",
                    change.note
                )),
                Ok((tensor, change)) => {
                    initial.changes.extend(change.map(|change| format!("`{name}`: {}", change.note)));
                    initial.tensors.insert(name, tensor);
                }
            }
        }
        problems.extend(found.into_iter().map(|(name, tensor)| format!("`{name}` {:?} is unknown", tensor.size())));
        if problems.is_empty() {
            return Ok(initial);
        }
        Err(InitialError::Misfit { from: configs::location::redact(&init.from), problems })
    }

    /// Equal for equal weights: by it ranks see that they have read the same.
    ///
    /// # Errors
    /// What libtorch reports.
    pub fn checksum(&self) -> Result<u32, InitialError> {
        let mut names: Vec<&String> = self.tensors.keys().collect();
        names.sort();
        names.into_iter().try_fold(0, |sum, name| {
            let bytes: Vec<u8> = to_vec(&self.tensors[name])?.into_iter().flat_map(f32::to_le_bytes).collect();
            Ok(crc32c::crc32c_append(crc32c::crc32c_append(sum, name.as_bytes()), &bytes))
        })
    }
}

/// The first values of a parameter that nobody gives, in its shape.
pub(crate) fn fresh(seed: u64, name: &str, spec: &ParamSpec) -> Tensor {
    Tensor::from_slice(&initial_values(seed, name, &spec.init, spec.numel())).view(spec.shape.as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::testing::tiny_dit;
    use configs::{Adapt, InitClasses};
    use serde_json::json;
    use std::collections::BTreeMap;

    fn recipe(lora: bool) -> Recipe {
        let mut config = json!({
            "model": tiny_dit().config(), "sample": {"vae": null},
            "diffusion": {"objective": "eps", "schedule": "linear", "timesteps": 1000},
            "dataset": {"rows": 1, "latent_shape": [4, 8, 8], "scaling_factor": 1.0, "vae_digest": null},
        });
        if lora {
            config["lora"] = json!({"rank": 2, "alpha": 2.0, "targets": ["attn.qkv"]});
        }
        Recipe::of_manifest(&config).unwrap()
    }

    fn source(change: impl Fn(&mut BTreeMap<String, Tensor>)) -> NamedWeights {
        let value = |(name, spec): (String, ParamSpec)| (name.clone(), fresh(5, &name, &spec));
        let mut tensors = tiny_dit().named_params().into_iter().map(value).collect();
        change(&mut tensors);
        NamedWeights { tensors, model: None }
    }

    fn fitted(source: NamedWeights, recipe: &Recipe, classes: InitClasses) -> Result<Initial, String> {
        let init = InitConfig {
            from: "s3://key:hunter2@bucket/base".to_owned(),
            weights: "ema".to_owned(),
            classes,
            null_class: Adapt::Keep,
            positions: None,
            learn_sigma: Adapt::Keep,
        };
        let fitted = Initial::fitted(source, &init, recipe, &*recipe.build_model().unwrap(), 1);
        fitted.map_err(|error| error.to_string())
    }

    #[test]
    fn everything_is_taken_and_adapters_are_left_to_be_drawn() {
        for lora in [false, true] {
            let initial = fitted(source(|_| {}), &recipe(lora), InitClasses::Keep).unwrap();
            let expected = source(|_| {}).tensors;
            assert_eq!(initial.tensors.len(), expected.len());
            assert!(expected.iter().all(|(name, tensor)| initial.tensors[name].equal(tensor)));
            assert!(initial.changes.is_empty());
        }
    }

    #[test]
    fn every_tensor_that_does_not_fit_is_listed() {
        let wrong = source(|tensors| {
            tensors.remove("blocks.0.attn.proj.bias");
            tensors.insert("z_embedder.weight".to_owned(), Tensor::from_slice(&[1f32]));
            tensors.insert("blocks.1.mlp.fc2.bias".to_owned(), Tensor::from_slice(&[1f32]));
            let _ = tensors["t_embedder.mlp.0.bias"].shallow_clone().fill_(f64::NAN);
        });
        let said = fitted(wrong, &recipe(false), InitClasses::Keep).unwrap_err();
        for says in [
            "s3://bucket/base does not fit",
            "`blocks.0.attn.proj.bias` [36] is missing",
            "`z_embedder.weight` [1] is unknown",
            "`blocks.1.mlp.fc2.bias` has shape [1]; expected [36]",
            "`t_embedder.mlp.0.bias` has values that are not finite",
        ] {
            assert!(said.contains(says), "{says}: {said}");
        }
        assert!(!said.contains("hunter2") && said.lines().count() == 5, "{said}");
    }

    #[test]
    fn a_new_table_that_nothing_would_train_is_refused() {
        let said = fitted(source(|_| {}), &recipe(true), InitClasses::New).unwrap_err();
        assert!(said.contains("`y_embedder.embedding_table.weight`") && said.contains("`lora.also_train`"), "{said}");
        assert!(fitted(source(|_| {}), &recipe(false), InitClasses::New).is_ok());
    }

    #[test]
    fn checksums_tell_other_values_and_other_names() {
        let initial = |change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
            let tensors = source(|tensors| change(tensors)).tensors.into_iter().collect();
            Initial { tensors, changes: Vec::new() }.checksum().unwrap()
        };
        let same = initial(&|_| {});
        assert_eq!(same, initial(&|_| {}));
        let bump = |tensors: &mut BTreeMap<String, Tensor>| {
            let _ = tensors["blocks.1.mlp.fc2.bias"].shallow_clone().fill_(0.5);
        };
        assert_ne!(same, initial(&bump));
    }
}
