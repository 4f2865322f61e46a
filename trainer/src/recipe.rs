//! What a run computes, resolved from config and data set, and recorded in every manifest.

use crate::diffusion::{
    FlowMatching, Gaussian, Objective, Prediction, Process, Respacing, Schedule, Tables, TimestepSampling,
    zero_terminal_snr,
};
use crate::model::dit::{Dit, DitConfig};
use crate::model::{Model, freeze::freeze, lora::adapt};
use crate::vae::AutoencoderKl;
use configs::{DiffusionConfig, LoraConfig, RunConfig};
use data_loader::{DatasetMeta, StreamSource};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;

/// Model, diffusion and data set of a run. The field names are those of the config's sections, so that it can be read
/// back out of a manifest's config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// The model's dimensions, none left open.
    pub model: DitConfig,
    /// The diffusion.
    pub diffusion: DiffusionConfig,
    /// What the data set says about itself.
    pub dataset: DatasetRecord,
    /// What sampling needs by default.
    pub sample: SampleRecipe,
    /// Adapters on the model.
    #[serde(default)]
    pub lora: Option<LoraConfig>,
    /// What of it is trained.
    #[serde(default)]
    pub train: TrainRecipe,
}

/// What of the model is trained.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainRecipe {
    /// Patterns of parameters that are not.
    #[serde(default)]
    pub freeze: Vec<String>,
}

/// What makes a data set another one as far as a run is concerned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DatasetRecord {
    /// Rows, of all sources together.
    pub rows: u64,
    /// `[channels, height, width]`.
    pub latent_shape: Vec<usize>,
    /// What latents are multiplied by; of a mix, those of its first source.
    pub scaling_factor: f64,
    /// Digest of the VAE that made the latents; of a mix, the first source's.
    pub vae_digest: Option<String>,
    /// Digest of file names and row groups, which the order of rows depends on; not of a mix.
    #[serde(default)]
    pub layout_sha256: Option<String>,
    /// The sources of a mix.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<SourceRecord>,
}

/// What makes a source of a mix another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Rows.
    pub rows: u64,
    /// What its latents are multiplied by.
    pub scaling_factor: f64,
    /// Digest of the VAE that made them.
    pub vae_digest: Option<String>,
    /// Digest of file names and row groups.
    pub layout_sha256: String,
}

/// Where the VAE is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleRecipe {
    /// AutoencoderKL folder.
    pub vae: Option<PathBuf>,
}

/// Config and data set contradict each other, or a manifest's config cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// Everything that does not fit.
    #[error("config and data set do not fit together:\n  {}", .0.join("\n  "))]
    Contradiction(Vec<String>),
    /// The manifest has no recipe of this version's form.
    #[error("the checkpoint's config cannot be read: {0}; it was written by another version of the trainer")]
    Manifest(#[from] serde_json::Error),
    /// The model's dimensions.
    #[error(transparent)]
    Model(#[from] crate::model::dit::DitConfigError),
    /// Adapters that the model cannot have.
    #[error(transparent)]
    Lora(#[from] crate::model::lora::LoraError),
    /// Patterns that match no parameter.
    #[error(transparent)]
    Patterns(#[from] crate::model::patterns::PatternError),
    /// A data set that no model here can be trained on.
    #[error("`data.url`: {0}")]
    Data(#[from] data_loader::DataError),
}

impl Recipe {
    /// Fills in what the config leaves to the data set.
    ///
    /// # Errors
    /// [`RecipeError::Contradiction`] lists every key that contradicts the data set's metadata; those of
    /// [`Recipe::build_model`].
    pub fn resolve(config: &RunConfig, sources: &[StreamSource]) -> Result<Self, RecipeError> {
        let Some(StreamSource { dataset, scaling_factor }) = sources.first() else {
            return Err(RecipeError::Contradiction(vec!["no data set is given; set `data.url`".to_owned()]));
        };
        let meta = dataset.meta();
        let mut problems = disagreements(sources);
        for StreamSource { dataset, .. } in sources {
            dataset.require_one_shape("this model")?;
            dataset.require_labels("this model")?;
        }
        let [channels, height, width] = meta.latent_shape[..] else {
            let problem =
                format!("the data set's latents have shape {:?}; expected [channels, side, side]", meta.latent_shape);
            return Err(RecipeError::Contradiction(vec![problem]));
        };
        if height != width {
            problems.push(format!("the data set's latents are {height}×{width}; this model takes square ones"));
        }
        let mut settle = |key: &str, wanted: Option<usize>, found: Option<usize>| match (wanted, found) {
            (Some(wanted), Some(found)) if wanted != found => {
                problems.push(format!(
                    "`model.{key}` = {wanted}, but the data set has {found}; remove the key or change it"
                ));
                found as i64
            }
            (None, None) => {
                problems.push(format!("`model.{key}` is not set and the data set does not say it; set it"));
                1
            }
            (wanted, found) => found.or(wanted).unwrap_or(1) as i64,
        };
        let m = &config.model;
        let classes = sources.iter().find_map(|source| source.dataset.meta().num_classes);
        let model = DitConfig {
            input_size: settle("input_size", m.input_size, Some(height)),
            in_channels: settle("in_channels", m.in_channels, Some(channels)),
            num_classes: settle("num_classes", m.num_classes, classes),
            patch_size: m.patch_size as i64,
            hidden_size: m.hidden_size as i64,
            depth: m.depth as i64,
            num_heads: m.num_heads as i64,
            mlp_ratio: m.mlp_ratio,
            class_dropout_prob: m.class_dropout_prob,
            learn_sigma: m.learn_sigma,
            conditioning: m.conditioning,
            numerics: m.numerics.into(),
        };
        if !problems.is_empty() {
            return Err(RecipeError::Contradiction(problems));
        }
        let recipe = Self {
            model,
            diffusion: config.diffusion.clone(),
            dataset: DatasetRecord {
                rows: sources.iter().map(|source| source.dataset.meta().rows).sum(),
                latent_shape: meta.latent_shape.clone(),
                scaling_factor: *scaling_factor,
                vae_digest: meta.vae_digest.clone(),
                layout_sha256: config.data.mix.is_empty().then(|| dataset.layout_sha256()),
                sources: config.data.mix.iter().zip(sources).map(|(_, source)| source_record(source)).collect(),
            },
            sample: SampleRecipe { vae: config.sample.vae.clone() },
            lora: config.lora.clone(),
            train: TrainRecipe { freeze: config.train.freeze.clone() },
        };
        if recipe.build_model()?.named_params().iter().any(|(_, spec)| spec.trainable) {
            return Ok(recipe);
        }
        let problem = format!("`train.freeze` = {:?} leaves nothing to train; take something out", recipe.train.freeze);
        Err(RecipeError::Contradiction(vec![problem]))
    }

    /// Reads the recipe out of a manifest's config.
    ///
    /// # Errors
    /// [`RecipeError::Manifest`].
    pub fn of_manifest(config: &Value) -> Result<Self, RecipeError> {
        Ok(Self::deserialize(config)?)
    }

    /// The config as it goes into manifests: with nothing left open, and what the data set is.
    pub fn record(&self, config: &RunConfig) -> Value {
        let mut record = config.to_json();
        record["model"]["input_size"] = self.model.input_size.into();
        record["model"]["in_channels"] = self.model.in_channels.into();
        record["model"]["num_classes"] = self.model.num_classes.into();
        record["dataset"] = serde_json::to_value(&self.dataset).unwrap_or_default();
        record
    }

    /// Compares a VAE with the latents of the data set; gives a warning where it may be the wrong one.
    ///
    /// # Errors
    /// [`RecipeError::Contradiction`] when it cannot decode these latents at all.
    pub fn check_vae(&self, vae: &AutoencoderKl) -> Result<Option<String>, RecipeError> {
        let (found, expected) = (vae.config().latent_channels, self.model.in_channels);
        if found != expected {
            let problem =
                format!("the VAE has {found} latent channels, the data set {expected}; give the VAE that made it");
            return Err(RecipeError::Contradiction(vec![problem]));
        }
        Ok(match (vae.digest(), &self.dataset.vae_digest) {
            (Some(found), Some(expected)) if found != expected => Some(format!(
                "weights {found} are not those that made the latents ({expected}); right only for a retrained decoder"
            )),
            _ => None,
        })
    }

    /// The model with its adapters.
    ///
    /// # Errors
    /// When dimensions, adapters and patterns do not fit together (a manifest can say anything).
    pub fn build_model(&self) -> Result<Arc<dyn Model>, RecipeError> {
        let base: Arc<dyn Model> = Arc::new(Dit::new(self.model.clone())?);
        let adapted = match &self.lora {
            Some(lora) => adapt(base, lora)?,
            None => base,
        };
        Ok(freeze(adapted, &self.train.freeze)?)
    }

    /// What a sampler has to reverse.
    pub fn process(&self) -> Process {
        match self.prediction() {
            Some(prediction) => Process::Gaussian { betas: self.betas(), prediction },
            None => Process::Flow,
        }
    }

    /// The training objective over all timesteps.
    pub fn build_objective(&self) -> Box<dyn Objective> {
        let d = &self.diffusion;
        let Some(prediction) = self.prediction() else {
            let sampling = match d.timestep_sampling {
                configs::TimestepSampling::Uniform => TimestepSampling::Uniform,
                configs::TimestepSampling::LogitNormal => {
                    TimestepSampling::LogitNormal { mean: d.logit_mean, std: d.logit_std }
                }
            };
            return Box::new(FlowMatching { sampling });
        };
        let betas = self.betas();
        let all: Vec<usize> = Respacing::All.kept(betas.len()).unwrap_or_default();
        let gaussian = Gaussian::new(Tables::new(&betas, &all), prediction, self.model.learn_sigma);
        Box::new(match d.min_snr_gamma {
            Some(gamma) => gaussian.min_snr(gamma),
            None => gaussian,
        })
    }

    /// What the model predicts of a diffusion in discrete time; `None` for a flow.
    fn prediction(&self) -> Option<Prediction> {
        match self.diffusion.objective {
            configs::Objective::Eps => Some(Prediction::Eps),
            configs::Objective::XStart => Some(Prediction::XStart),
            configs::Objective::V => Some(Prediction::V),
            configs::Objective::Flow => None,
        }
    }

    fn betas(&self) -> Vec<f64> {
        let d = &self.diffusion;
        let schedule = match d.schedule {
            configs::Schedule::Linear => Schedule::Linear,
            configs::Schedule::SquaredCosine => Schedule::SquaredCosine,
            configs::Schedule::ScaledLinear => Schedule::ScaledLinear,
        };
        let betas = match d.beta_start.zip(d.beta_end) {
            Some(ends) => schedule.betas_between(ends, d.timesteps),
            None => schedule.betas(d.timesteps),
        };
        if d.zero_terminal_snr { zero_terminal_snr(&betas) } else { betas }
    }
}

fn source_record(StreamSource { dataset, scaling_factor }: &StreamSource) -> SourceRecord {
    let DatasetMeta { rows, vae_digest, .. } = dataset.meta().clone();
    SourceRecord { rows, scaling_factor: *scaling_factor, vae_digest, layout_sha256: dataset.layout_sha256() }
}

/// What the sources of a mix must share and do not.
fn disagreements(sources: &[StreamSource]) -> Vec<String> {
    let mut problems = Vec::new();
    let Some((first, others)) = sources.split_first() else { return problems };
    let expected = first.dataset.meta();
    for (number, other) in others.iter().enumerate() {
        let (found, number) = (other.dataset.meta(), number + 1);
        if found.latent_shape != expected.latent_shape {
            problems.push(format!(
                "latents of `data.mix[{number}]` have shape {:?}, those of `data.mix[0]` {:?}; all must have one",
                found.latent_shape, expected.latent_shape
            ));
        }
        if let (Some(found), Some(expected)) = (found.num_classes, expected.num_classes)
            && found != expected
        {
            problems.push(format!(
                "`data.mix[{number}]` has {found} classes, `data.mix[0]` {expected}; all must have the same"
            ));
        }
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn recipe(diffusion: Value) -> Recipe {
        let model = json!({
            "input_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1, "num_heads": 2,
            "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 10, "learn_sigma": true,
        });
        let dataset = json!({"rows": 1, "latent_shape": [4, 8, 8], "scaling_factor": 1.0, "vae_digest": null});
        let config = json!({"model": model, "diffusion": diffusion, "dataset": dataset, "sample": {"vae": null}});
        Recipe::of_manifest(&config).unwrap()
    }

    #[test]
    fn manifests_from_before_the_further_keys_are_read() {
        let recipe = recipe(json!({"objective": "eps", "schedule": "linear", "timesteps": 1000}));
        let betas = Schedule::Linear.betas(1000);
        assert_eq!(recipe.process(), Process::Gaussian { betas, prediction: Prediction::Eps });
    }

    #[test]
    fn the_process_is_the_one_that_the_keys_describe() {
        let keys = json!({
            "objective": "v", "schedule": "scaled-linear", "timesteps": 100, "beta_start": 0.001, "beta_end": 0.1,
            "zero_terminal_snr": true,
        });
        let betas = zero_terminal_snr(&Schedule::ScaledLinear.betas_between((0.001, 0.1), 100));
        assert_eq!(recipe(keys).process(), Process::Gaussian { betas, prediction: Prediction::V });
        let flow = json!({"objective": "flow", "schedule": "linear", "timesteps": 1000});
        assert_eq!(recipe(flow).process(), Process::Flow);
    }
}
