//! What is in a source of weights: its facts, and statistics of every tensor, one tensor in memory at a time.

use super::file::{self, TensorFile};
use super::values::{self, Dtype, TensorSpec};
use super::{InteropError, WeightsSection, diffusers, official, read_weights, run};
use crate::recipe::Recipe;
use checkpoint::CheckpointReader;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Statistics of the finite values of a tensor, in float64.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Square root of the sum of squares.
    pub l2_norm: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// Mean.
    pub mean: f64,
    /// How many are NaN or infinite.
    pub non_finite: u64,
}

impl Stats {
    /// Of these values; all zero where none is finite.
    pub fn of(values: &[f32]) -> Self {
        let mut stats = Self { min: f64::INFINITY, max: f64::NEG_INFINITY, ..Self::default() };
        let (mut sum, mut squares, mut count) = (0.0, 0.0, 0u64);
        for value in values.iter().map(|&value| f64::from(value)) {
            if !value.is_finite() {
                stats.non_finite += 1;
                continue;
            }
            (sum, squares, count) = (sum + value, squares + value * value, count + 1);
            (stats.min, stats.max) = (stats.min.min(value), stats.max.max(value));
        }
        if count == 0 {
            return Self { non_finite: stats.non_finite, ..Self::default() };
        }
        Self { l2_norm: squares.sqrt(), mean: sum / count as f64, ..stats }
    }
}

/// A tensor and its statistics.
#[derive(Clone, Debug, Serialize)]
pub struct TensorSummary {
    /// With its section.
    pub name: String,
    /// As safetensors spells it.
    pub dtype: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Bytes of its values.
    pub bytes: u64,
    /// Of its values as float32.
    #[serde(flatten)]
    pub stats: Stats,
}

/// All tensors of a section together.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SectionSummary {
    /// Empty for tensors without a section.
    pub name: String,
    /// How many.
    pub tensors: u64,
    /// Elements of all.
    pub numel: u64,
    /// Bytes of all values.
    pub bytes: u64,
    /// Norm over all.
    pub l2_norm: f64,
    /// NaN and infinite values.
    pub non_finite: u64,
}

/// What a source holds.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Redacted path or URL.
    pub source: String,
    /// What it is.
    pub kind: &'static str,
    /// What it says about itself, by name.
    pub facts: Value,
    /// By section.
    pub sections: Vec<SectionSummary>,
    /// By name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tensors: Vec<TensorSummary>,
}

impl Summary {
    /// Reads everything in `source` once: a run or checkpoint of ours, a file, or a diffusers folder.
    ///
    /// # Errors
    /// Nothing readable there, or damage.
    pub fn of(source: &str) -> Result<Self, InteropError> {
        let path = configs::location::local_path(source);
        let mut summary = Self {
            source: configs::location::redact(source),
            kind: "",
            facts: Value::Null,
            sections: Vec::new(),
            tensors: Vec::new(),
        };
        match (run::local_file(source), path.filter(|path| diffusers::is_folder(path))) {
            (Some(path), _) => summary.read_file(&*file::open(&path)?)?,
            (None, Some(folder)) => summary.read_pipeline(&folder)?,
            (None, None) => summary.read_checkpoint(&run::reader(source)?)?,
        }
        summary.add_up();
        Ok(summary)
    }

    fn push(&mut self, name: &str, spec: &TensorSpec, values: &[f32]) {
        let stats = Stats::of(values);
        let (dtype, shape, bytes) = (spec.dtype.to_string(), spec.shape.clone(), spec.bytes() as u64);
        self.tensors.push(TensorSummary { name: name.to_owned(), dtype, shape, bytes, stats });
    }

    fn read_checkpoint(&mut self, reader: &CheckpointReader) -> Result<(), InteropError> {
        let manifest = reader.manifest();
        self.kind = "checkpoint";
        self.facts = json!({
            "manifest": manifest.key(),
            "step": manifest.step,
            "optimizer_step": manifest.optimizer_step,
            "attempt": manifest.attempt,
            "resumed_from": manifest.resumed_from,
            "world_size": manifest.world_size,
            "created_unix_ms": manifest.created_unix_ms,
            "writer": manifest.writer,
            "metrics": manifest.metrics,
            "shards": manifest.shards.len(),
            "config": manifest.config,
        });
        // A checkpoint of another version still has its tensors.
        if let Ok(model) = Recipe::of_manifest(&manifest.config) {
            self.facts["model"] = serde_json::to_value(model.model).unwrap_or_default();
        }
        for name in reader.names() {
            let shape = reader.shape(name).unwrap_or_default().to_vec();
            self.push(name, &TensorSpec { dtype: Dtype::F32, shape }, &reader.read_all_f32(name)?);
        }
        Ok(())
    }

    fn read_file(&mut self, file: &dyn TensorFile) -> Result<(), InteropError> {
        self.kind = file.format();
        self.facts = json!({ "about": file.about() });
        for section in [WeightsSection::Model, WeightsSection::Ema] {
            let Ok(names) = official::section(file, &section) else { continue };
            let specs: BTreeMap<&str, &TensorSpec> =
                names.iter().map(|(name, in_file)| (name.as_str(), &file.tensors()[in_file])).collect();
            if let Some(model) = official::infer(&specs, file.about()) {
                self.facts["model"] = serde_json::to_value(model).unwrap_or_default();
                break;
            }
        }
        for (name, spec) in file.tensors() {
            self.push(name, spec, &values::to_vec(&official::tensor(file, name)?)?);
        }
        Ok(())
    }

    fn read_pipeline(&mut self, folder: &std::path::Path) -> Result<(), InteropError> {
        let weights = read_weights(&folder.display().to_string(), Default::default())?;
        self.kind = "diffusers folder (official names)";
        self.facts = json!({ "model": weights.model });
        for (name, tensor) in &weights.tensors {
            let shape = tensor.size().iter().map(|&side| side as usize).collect();
            self.push(name, &TensorSpec { dtype: Dtype::F32, shape }, &values::to_vec(tensor)?);
        }
        Ok(())
    }

    fn add_up(&mut self) {
        let mut by_name: BTreeMap<String, SectionSummary> = BTreeMap::new();
        for tensor in &self.tensors {
            let name = tensor.name.rsplit_once('/').map_or("", |(section, _)| section);
            // AdamW's state has a folder for every parameter; together it is one section.
            let name = if name.starts_with("opt/state/") { "opt/state" } else { name };
            let section = by_name.entry(name.to_owned()).or_default();
            section.tensors += 1;
            section.numel += tensor.shape.iter().map(|&side| side as u64).product::<u64>();
            section.bytes += tensor.bytes;
            section.l2_norm = section.l2_norm.hypot(tensor.stats.l2_norm);
            section.non_finite += tensor.stats.non_finite;
        }
        self.sections = by_name.into_iter().map(|(name, section)| SectionSummary { name, ..section }).collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_are_of_the_finite_values() {
        let stats = Stats::of(&[3.0, -4.0, f32::NAN, 0.0, f32::INFINITY]);
        assert_eq!(stats, Stats { l2_norm: 5.0, min: -4.0, max: 3.0, mean: -1.0 / 3.0, non_finite: 2 });
        assert_eq!(Stats::of(&[]), Stats::default());
        assert_eq!(Stats::of(&[f32::NAN]), Stats { non_finite: 1, ..Stats::default() });
        // Squares beyond float32.
        assert!((Stats::of(&[3e38, 3e38]).l2_norm / (3e38f32 as f64 * 2f64.sqrt()) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn sections_add_up_over_their_tensors() {
        let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/torch_files/zip.pt");
        let summary = Summary::of(data.to_str().unwrap()).unwrap();
        assert_eq!(summary.kind, "torch.save");
        assert_eq!(summary.facts["about"]["args"]["model"], "DiT-S/4");
        let model = summary.sections.iter().find(|section| section.name == "model").unwrap();
        assert_eq!((model.tensors, model.numel, model.non_finite), (11, 24 * 5 + 6 + 4 + 2 + 1 + 6, 0));
        let of_section = |tensor: &&TensorSummary| tensor.name.starts_with("model/");
        let squares: f64 = summary.tensors.iter().filter(of_section).map(|t| t.stats.l2_norm.powi(2)).sum();
        assert!((model.l2_norm / squares.sqrt() - 1.0).abs() < 1e-12);
        let half = summary.tensors.iter().find(|tensor| tensor.name == "model/f16").unwrap();
        assert_eq!((half.dtype.as_str(), &half.shape[..], half.bytes), ("F16", &[4, 6][..], 48));
    }
}
