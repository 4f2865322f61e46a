//! `trainer export`: a checkpoint as others read it.

use crate::interop::diffusers::Pipeline;
use crate::interop::torch_file::write::{self, PyValue};
use crate::interop::values::{self, Dtype, TensorSpec};
use crate::interop::{NamedWeights, WeightsSection, read_weights, run, safetensors, train_file};
use crate::model::Model;
use crate::model::dit::{Dit, Numerics};
use crate::recipe::Recipe;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// Options of `trainer export`.
#[derive(clap::Args)]
pub struct ExportArgs {
    /// A run folder (its newest valid checkpoint) or one checkpoint of it; for `pt` and `safetensors` also any file or
    /// folder that `trainer import` reads.
    #[arg(long, value_name = "URL")]
    checkpoint: String,
    /// `ema`, `model` or another section of the checkpoint; `train-pt` has them all.
    #[arg(long, default_value = "ema", value_name = "ema|model|NAME")]
    weights: WeightsSection,
    /// What to write.
    #[arg(long, value_enum)]
    format: Format,
    /// Where to; replaced if it is a file already.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Element type of the written weights.
    #[arg(long, value_enum, default_value_t = DtypeChoice::F32)]
    dtype: DtypeChoice,
    /// AutoencoderKL folder for the pipeline of `diffusers`; the one recorded in the checkpoint when not given.
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// A text file with a name for every class, one a line, for the pipeline of `diffusers`.
    #[arg(long, value_name = "FILE")]
    class_names: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Format {
    /// The state dict as safetensors.
    Safetensors,
    /// The state dict as torch.save writes it; the official sample.py reads it.
    Pt,
    /// Weights, average, optimizer state and arguments as the official train.py saves them.
    TrainPt,
    /// A folder for DiTPipeline.from_pretrained.
    Diffusers,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum DtypeChoice {
    F32,
    F16,
    Bf16,
}

impl DtypeChoice {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }
}

/// Writes the file or folder.
///
/// # Errors
/// A checkpoint that cannot be read, or something that the format cannot hold.
pub fn export(args: &ExportArgs) -> Result<()> {
    if matches!(args.format, Format::TrainPt | Format::Diffusers) && args.dtype != DtypeChoice::F32 {
        bail!("--dtype: train-pt and diffusers are written in f32; use --format pt or safetensors for half precision");
    }
    if (args.vae.is_some() || args.class_names.is_some()) && args.format != Format::Diffusers {
        bail!("--vae and --class-names belong to --format diffusers; a state dict has neither");
    }
    let notes = match args.format {
        Format::Safetensors => {
            let weights = read_weights(&args.checkpoint, args.weights.clone())?;
            safetensors::write_weights(&args.out, &weights, args.dtype.dtype())?;
            notes(&weights)
        }
        Format::Pt => {
            let weights = read_weights(&args.checkpoint, args.weights.clone())?;
            write_pt(&args.out, &weights, args.dtype.dtype())?;
            notes(&weights)
        }
        Format::TrainPt => export_train_file(args)?,
        Format::Diffusers => export_pipeline(args)?,
    };
    for note in notes {
        println!("note: {note}");
    }
    println!("{}", args.out.display());
    Ok(())
}

fn export_train_file(args: &ExportArgs) -> Result<Vec<String>> {
    let reader = run::reader(&args.checkpoint)?;
    let config = &reader.manifest().config;
    let recipe = Recipe::of_manifest(config)?;
    if recipe.lora.is_some() {
        bail!(
            "--format train-pt: train.py knows no adapters; --format pt writes the weights that they are merged into"
        );
    }
    train_file::write(&args.out, &reader, &recipe).context("--format train-pt")?;
    let mut notes = numerics_note(&recipe.model.numerics);
    if config["optimizer"]["groups"].as_array().is_some_and(|groups| !groups.is_empty()) {
        notes.push(
            "train.py has one parameter group: `optimizer.groups` is not in the file, only the base settings"
                .to_owned(),
        );
    }
    notes.push("`args` is a plain dict, so that torch.load reads the file with weights_only=True".to_owned());
    Ok(notes)
}

fn export_pipeline(args: &ExportArgs) -> Result<Vec<String>> {
    let recipe = Recipe::of_manifest(&run::reader(&args.checkpoint)?.manifest().config)?;
    let weights = read_weights(&args.checkpoint, args.weights.clone())?;
    let names = args.class_names.as_ref().map(|path| {
        let text = std::fs::read_to_string(path).with_context(|| format!("--class-names {}", path.display()))?;
        Ok::<Vec<String>, anyhow::Error>(text.lines().map(str::to_owned).collect())
    });
    let names = names.transpose()?;
    let vae = args.vae.as_deref().or(recipe.sample.vae.as_deref());
    let pipeline = Pipeline { weights: &weights.tensors, recipe: &recipe, vae, class_names: names.as_deref() };
    Ok(pipeline.write(&args.out)?)
}

/// The state dict in the order of the official one where the model is known, else by name.
fn write_pt(path: &Path, weights: &NamedWeights, dtype: Dtype) -> Result<()> {
    let model = weights.model.clone().and_then(|config| Dit::new(config).ok());
    let official: Vec<String> =
        model.map(|model| model.named_params().into_iter().map(|(name, _)| name).collect()).unwrap_or_default();
    let known = official.iter().filter(|name| weights.tensors.contains_key(*name));
    let others = weights.tensors.keys().filter(|name| !official.contains(name));
    let entry = |name: &String| {
        let shape = weights.tensors[name].size().iter().map(|&side| side as usize).collect();
        (name.as_str().into(), PyValue::Tensor(name.clone(), TensorSpec { dtype, shape }))
    };
    let state_dict = PyValue::OrderedDict(known.chain(others).map(entry).collect());
    write::write(path, &state_dict, |name| Ok(values::encode(&values::to_vec(&weights.tensors[name])?, dtype)))?;
    Ok(())
}

fn notes(weights: &NamedWeights) -> Vec<String> {
    weights.model.as_ref().map(|model| numerics_note(&model.numerics)).unwrap_or_default()
}

fn numerics_note(numerics: &Numerics) -> Vec<String> {
    let differs = *numerics != Numerics::default();
    let note = "the model was trained with the numerics of stock diffusers; the official code computes something else with these weights";
    differs.then(|| note.to_owned()).into_iter().collect()
}
