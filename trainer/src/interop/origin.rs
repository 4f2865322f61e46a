//! What a source has to offer to a run that is to go on from it: weights, average, moments, step.

use super::file::{self, TensorFile};
use super::train_file::{self, MOMENTS, OptimizerState};
use super::{InteropError, NamedWeights, WeightsSection, diffusers, official, run, values};
use crate::model::ParamSpec;
use crate::model::dit::Numerics;
use serde_json::Value;
use std::collections::BTreeMap;
use tch::Tensor;

/// A source whose tensors are known to fit a model.
pub struct Origin {
    model: Section,
    ema: Section,
    file: Option<Box<dyn TensorFile>>,
    optimizer: Option<OptimizerState>,
    /// The constants that its model computes with, where it says so.
    pub numerics: Option<Numerics>,
    /// What people should know about it.
    pub notes: Vec<String>,
}

/// The tensors of one section by their official names.
enum Section {
    /// Names in the file.
    InFile(BTreeMap<String, String>),
    InMemory(BTreeMap<String, Tensor>),
    /// The weights serve as the average.
    OfModel,
}

/// Tensors that are not those of the model.
#[derive(Debug, thiserror::Error)]
#[error("{source_name}: its `{section}` tensors do not fit the config's model ({} differences); change `[model]` or the source:\n  {}", problems.len(), problems.join("\n  "))]
pub struct Misfit {
    source_name: String,
    section: &'static str,
    problems: Vec<String>,
}

/// Why a source cannot be gone on from.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// It cannot be read.
    #[error(transparent)]
    Interop(#[from] InteropError),
    /// It is of another model.
    #[error(transparent)]
    Misfit(#[from] Misfit),
}

impl Origin {
    /// Opens `source` (a file, a diffusers folder, or a checkpoint of ours) for a model with these parameters.
    ///
    /// # Errors
    /// [`OriginError`]; a misfit lists every tensor that is missing, unknown or of another shape.
    pub fn open(source: &str, params: &[(String, ParamSpec)], with_optimizer: bool) -> Result<Self, OriginError> {
        let origin = match run::local_file(source) {
            Some(path) => Self::of_file(file::open(&path)?, params, with_optimizer)?,
            None => Self::of_folder(source)?,
        };
        let source_name = || configs::location::redact(source);
        for (section, tensors) in [("model", &origin.model), ("ema", &origin.ema)] {
            let problems = origin.misfits(tensors, params);
            if !problems.is_empty() {
                return Err(Misfit { source_name: source_name(), section, problems }.into());
            }
        }
        Ok(origin)
    }

    fn of_file(
        file: Box<dyn TensorFile>,
        params: &[(String, ParamSpec)],
        with_optimizer: bool,
    ) -> Result<Self, OriginError> {
        let mut notes = Vec::new();
        let (model, ema) =
            [WeightsSection::Model, WeightsSection::Ema].map(|section| official::section(&*file, &section)).into();
        let (model, ema) = match (model, ema) {
            (Ok(model), Ok(ema)) if model != ema => (model, Section::InFile(ema)),
            (Ok(only), _) | (Err(_), Ok(only)) => {
                notes.push("it has one set of weights, which becomes both the weights and the average".to_owned());
                (only, Section::OfModel)
            }
            (Err(error), Err(_)) => return Err(error.into()),
        };
        let optimizer = if with_optimizer { train_file::optimizer_state(&*file, params)? } else { None };
        let wide = file.tensors().values().any(|spec| spec.dtype == values::Dtype::F64);
        if wide {
            notes.push("its float64 tensors are rounded to float32".to_owned());
        }
        Ok(Self { model: Section::InFile(model), ema, optimizer, numerics: None, notes, file: Some(file) })
    }

    fn of_folder(source: &str) -> Result<Self, OriginError> {
        let NamedWeights { tensors: model, model: config } = super::read_weights(source, WeightsSection::Model)?;
        let numerics = config.map(|config| config.numerics);
        let is_diffusers = configs::location::local_path(source).is_some_and(|path| diffusers::is_folder(&path));
        let (ema, notes) = match is_diffusers {
            true => {
                let note = "it has one set of weights, which becomes both the weights and the average".to_owned();
                (Section::OfModel, vec![note])
            }
            false => (Section::InMemory(super::read_weights(source, WeightsSection::Ema)?.tensors), Vec::new()),
        };
        Ok(Self { model: Section::InMemory(model), ema, file: None, optimizer: None, numerics, notes })
    }

    fn misfits(&self, section: &Section, params: &[(String, ParamSpec)]) -> Vec<String> {
        let mut found: BTreeMap<&str, Vec<i64>> = match (section, &self.file) {
            (Section::InFile(names), Some(file)) => {
                let shape = |name: &String| file.tensors()[name].shape.iter().map(|&side| side as i64).collect();
                names.iter().map(|(name, in_file)| (name.as_str(), shape(in_file))).collect()
            }
            (Section::InMemory(tensors), _) => {
                tensors.iter().map(|(name, tensor)| (name.as_str(), tensor.size())).collect()
            }
            _ => return Vec::new(),
        };
        let mut problems = Vec::new();
        for (name, spec) in params {
            match found.remove(name.as_str()) {
                Some(shape) if shape == spec.shape => {}
                Some(shape) => problems.push(format!("`{name}` has shape {shape:?}, expected {:?}", spec.shape)),
                None => problems.push(format!("`{name}` {:?} is missing", spec.shape)),
            }
        }
        problems.extend(found.iter().map(|(name, shape)| format!("`{name}` {shape:?} is not part of the model")));
        problems
    }

    /// Optimizer updates that the moments stand for; 0 without moments.
    pub fn optimizer_step(&self) -> u64 {
        self.optimizer.as_ref().map_or(0, |state| state.step)
    }

    /// The settings that the moments were made with (`lr`, `betas` …).
    pub fn optimizer_settings(&self) -> Option<&Value> {
        self.optimizer.as_ref().map(|state| &state.settings)
    }

    /// The values of parameter `name` in a section of our checkpoints; moments that the source does not have are zero, and
    /// averages that it does not have are the main one.
    ///
    /// # Errors
    /// Damage.
    pub fn values(&self, section: &str, name: &str, spec: &ParamSpec) -> Result<Vec<f32>, InteropError> {
        if let Some(moment) = MOMENTS.iter().position(|(ours, _)| *ours == section) {
            return match (&self.optimizer, &self.file) {
                (Some(state), Some(file)) => values::to_vec(&official::tensor(&**file, &state.moments[name][moment])?),
                _ => Ok(vec![0.0; spec.numel()]),
            };
        }
        let tensors = match (section, &self.ema) {
            ("model", _) | (_, Section::OfModel) => &self.model,
            (_, ema) => ema,
        };
        match (tensors, &self.file) {
            (Section::InFile(names), Some(file)) => values::to_vec(&official::tensor(&**file, &names[name])?),
            (Section::InMemory(tensors), _) => values::to_vec(&tensors[name]),
            _ => Ok(vec![0.0; spec.numel()]),
        }
    }
}
