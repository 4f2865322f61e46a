//! A pipeline folder that `diffusers.DiTPipeline.from_pretrained` loads.

use super::config::{DIFFUSERS_VERSION, TransformerConfig};
use super::{DiffusersError, PATCH, PIPELINE_NULL_LABEL, label_rows, names, scheduler};
use crate::interop::values::Dtype;
use crate::interop::{InteropError, NamedWeights, safetensors};
use crate::model::dit::DitConfig;
use crate::recipe::Recipe;
use crate::vae::AutoencoderKl;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::{Device, Tensor};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

/// What goes into a pipeline folder.
pub struct Pipeline<'a> {
    /// Official names, float32.
    pub weights: &'a BTreeMap<String, Tensor>,
    /// Model, diffusion and scaling of the latents.
    pub recipe: &'a Recipe,
    /// AutoencoderKL folder; without it whoever loads the pipeline has to pass a VAE.
    pub vae: Option<&'a Path>,
    /// What the classes are called, first to last; their numbers when not given.
    pub class_names: Option<&'a [String]>,
}

impl Pipeline<'_> {
    /// Writes the folder, which must not exist or be empty; it appears complete or not at all. Gives notes for the user: what
    /// diffusers will do otherwise than the trainer.
    ///
    /// # Errors
    /// [`DiffusersError::NotRepresentable`] for a model, process or VAE that the pipeline has no way to hold; files that
    /// cannot be read or written.
    pub fn write(&self, folder: &Path) -> Result<Vec<String>, InteropError> {
        let model = &self.recipe.model;
        let rows = label_rows(model.num_classes);
        let config = TransformerConfig::of(model, rows)?;
        let scheduler = scheduler::config_of(self.recipe)?;
        let transformer = names::to_diffusers(self.weights, model, rows)?;
        let index = self.index()?;
        let vae = self.vae.map(|vae| self.check_vae(vae)).transpose()?;

        let taken = folder.read_dir().is_ok_and(|mut entries| entries.next().is_some()) || folder.is_file();
        if taken {
            let reason =
                std::io::Error::new(std::io::ErrorKind::AlreadyExists, "there is something already; give another name");
            return Err(InteropError::io(folder, "write")(reason));
        }
        let io = |error| InteropError::io(folder, "write")(error);
        let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(parent).map_err(io)?;
        let unfinished = tempfile::Builder::new().prefix(".diffusers-").tempdir_in(parent).map_err(io)?;
        let root = unfinished.path();
        for part in ["transformer", "scheduler"] {
            std::fs::create_dir(root.join(part)).map_err(io)?;
        }
        let config = serde_json::to_value(config).unwrap_or_default();
        write_json(&root.join("transformer/config.json"), &config)?;
        let transformer = NamedWeights { tensors: transformer, model: None };
        safetensors::write_weights(&root.join("transformer").join(WEIGHTS), &transformer, Dtype::F32)?;
        write_json(&root.join("scheduler/scheduler_config.json"), &scheduler)?;
        if let Some(vae) = &vae {
            std::fs::create_dir(root.join("vae")).map_err(io)?;
            write_json(&root.join("vae/config.json"), &vae.config)?;
            std::fs::copy(&vae.weights, root.join("vae").join(WEIGHTS))
                .map_err(InteropError::io(&vae.weights, "copy"))?;
        }
        write_json(&root.join("model_index.json"), &index)?;
        let notes = self.notes(vae.and_then(|vae| vae.warning));
        let readme =
            format!("# DiT, exported by Ditharos for diffusers {DIFFUSERS_VERSION}\n\n- {}\n", notes.join("\n- "));
        std::fs::write(root.join("README.md"), readme).map_err(io)?;

        // An empty folder may stand in the way; `tempdir` made the new one private.
        let _ = std::fs::remove_dir(folder);
        std::fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o755)).map_err(io)?;
        std::fs::rename(root, folder).map_err(io)?;
        drop(unfinished.keep());
        Ok(notes)
    }

    fn index(&self) -> Result<Value, DiffusersError> {
        let classes = self.recipe.model.num_classes;
        if let Some(names) = self.class_names
            && names.len() as i64 != classes
        {
            return Err(DiffusersError::NotRepresentable {
                what: format!("{} class names", names.len()),
                why: format!("the model has {classes} classes; give one name for each"),
            });
        }
        let name =
            |class: i64| self.class_names.map_or_else(|| class.to_string(), |names| names[class as usize].clone());
        let id2label: Map<String, Value> = (0..classes).map(|class| (class.to_string(), name(class).into())).collect();
        Ok(json!({
            "_class_name": "DiTPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "id2label": id2label,
            "scheduler": ["diffusers", "DDIMScheduler"],
            "transformer": ["diffusers", "DiTTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }))
    }

    /// The VAE's config as the pipeline needs it, and its weight file.
    fn check_vae(&self, folder: &Path) -> Result<VaePart, InteropError> {
        let refuse = |reason: String| DiffusersError::Vae(reason);
        let vae = AutoencoderKl::load(folder, Device::Cpu).map_err(|error| refuse(error.to_string()))?;
        let warning = self.recipe.check_vae(&vae).map_err(|error| refuse(error.to_string()))?;
        if let Some(shift) = vae.config().shift_factor.filter(|&shift| shift != 0.0) {
            return Err(DiffusersError::NotRepresentable {
                what: format!("a VAE with `shift_factor` = {shift}"),
                why: "DiTPipeline decodes latents / scaling_factor and adds no shift".to_owned(),
            }
            .into());
        }
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(InteropError::io(&path, "read"))?;
        let mut config: Value = serde_json::from_str(&text).map_err(|error| refuse(error.to_string()))?;
        config["_class_name"] = "AutoencoderKL".into();
        // The latents' factor is the recorded one, whatever this copy of the VAE says.
        config["scaling_factor"] = self.recipe.dataset.scaling_factor.into();
        Ok(VaePart { config, weights: vae.weights_file().unwrap_or(folder).to_owned(), warning })
    }

    fn notes(&self, vae_warning: Option<String>) -> Vec<String> {
        let DitConfig { num_classes: classes, learn_sigma, numerics, .. } = self.recipe.model;
        let mut notes = Vec::new();
        if numerics.freq_shift != 1.0 {
            notes.push(format!(
                "diffusers {DIFFUSERS_VERSION} computes the timestep features with frequencies 10000^(-i/127), the official DiT and this \
                 trainer with 10000^(-i/128), and config.json has no key for it. Undo it after loading:\n    {PATCH}"
            ));
        }
        notes.push(format!(
            "norm_eps is written as {:e}, as the model was trained; diffusers' own default is 1e-5.",
            numerics.mlp_norm_eps
        ));
        notes.push(
            "DiTPipeline guides all latent channels (the official scripts the first three), with scale 4 unless told otherwise."
                .to_owned(),
        );
        if learn_sigma {
            notes.push("DiTPipeline does not use the learned variance.".to_owned());
        }
        if classes < PIPELINE_NULL_LABEL {
            notes.push(format!(
                "DiTPipeline takes label {PIPELINE_NULL_LABEL} for \"no class\"; the table is filled up with copies of this model's null label, so \
                 labels {classes} to {PIPELINE_NULL_LABEL} all mean \"no class\"."
            ));
        } else if classes > PIPELINE_NULL_LABEL {
            notes.push(format!(
                "WARNING: DiTPipeline takes label {PIPELINE_NULL_LABEL} for \"no class\", which is a class of this model ({classes} of them, null label \
                 {classes}): its guidance is wrong. Sample with guidance_scale=1, or replace [{PIPELINE_NULL_LABEL}] in pipeline_dit.py."
            ));
        }
        match self.vae {
            None => notes.push(
                "There is no vae folder: load with DiTPipeline.from_pretrained(folder, vae=AutoencoderKL.from_pretrained(...))."
                    .to_owned(),
            ),
            Some(_) => notes.extend(vae_warning.map(|warning| format!("The VAE's {warning}."))),
        }
        notes
    }
}

struct VaePart {
    config: Value,
    weights: PathBuf,
    warning: Option<String>,
}

fn write_json(path: &Path, value: &Value) -> Result<(), InteropError> {
    let text = format!("{value:#}\n");
    std::fs::write(path, text).map_err(InteropError::io(path, "write"))
}
