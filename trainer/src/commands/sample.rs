//! `trainer sample`: images from a checkpoint.

use super::source;
use crate::images::{Grid, ImageBatch, NpzWriter};
use crate::model::{Model, WeightSet};
use crate::recipe::Recipe;
use crate::sampling::{Generator, GuidedChannels, SamplerKind, SamplingOptions};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result, bail};
use checkpoint::CheckpointReader;
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::path::PathBuf;
use tch::{Device, Tensor};

/// Options of `trainer sample`.
#[derive(clap::Args)]
pub struct SampleArgs {
    /// A run folder (its newest valid checkpoint), or one checkpoint of it (`<run>/checkpoints/step-000001000`).
    #[arg(long, value_name = "URL")]
    checkpoint: String,
    /// Which weights.
    #[arg(long, value_enum, default_value_t = Section::Ema)]
    weights: Section,
    /// How many images; labels go round `--labels`.
    #[arg(long, default_value_t = 40)]
    num: usize,
    /// Labels, repeated in turn; all classes when not given.
    #[arg(long, value_delimiter = ',', value_name = "LABEL,…")]
    labels: Vec<i64>,
    /// Which sampler.
    #[arg(long, value_enum, default_value_t = Sampler::Ddpm)]
    sampler: Sampler,
    /// Denoising steps.
    #[arg(long, default_value_t = 250)]
    steps: usize,
    /// Classifier-free guidance scale; 1 is none.
    #[arg(long, default_value_t = 1.5)]
    cfg_scale: f64,
    /// Output channels that guidance acts on: all, or the first three as in the official code.
    #[arg(long, value_enum, default_value_t = Channels::All)]
    cfg_channels: Channels,
    /// Seed of the noise. Sample i depends on seed, i and its label (and, in the last bits, on --batch).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Images drawn at once.
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// AutoencoderKL folder; the one recorded in the checkpoint when not given.
    #[arg(long, value_name = "DIR")]
    vae: Option<PathBuf>,
    /// Writes `arr_0` [N, H, W, 3] uint8 and `arr_1` (labels) for the field's FID evaluator.
    #[arg(long, value_name = "FILE.npz")]
    out: Option<PathBuf>,
    /// Writes the first images side by side.
    #[arg(long, value_name = "FILE.png")]
    grid: Option<PathBuf>,
    /// Images of the grid.
    #[arg(long, default_value_t = 100)]
    grid_num: usize,
    /// CPU threads; all cores when not given.
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Section {
    Ema,
    Model,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Sampler {
    Ddpm,
    Ddim,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Channels {
    All,
    FirstThree,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum DeviceChoice {
    Auto,
    Cpu,
    Cuda,
}

/// Draws the images.
///
/// # Errors
/// A checkpoint, VAE or option that cannot be used.
pub fn sample(args: &SampleArgs) -> Result<()> {
    if args.out.is_none() && args.grid.is_none() {
        bail!("nothing to write: give --out FILE.npz, --grid FILE.png or both");
    }
    if args.num == 0 || args.batch == 0 {
        bail!("--num and --batch must be at least 1");
    }
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    let device = match (args.device, crate::ffi::load_cuda()) {
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, Err(_)) => Device::Cpu,
        (DeviceChoice::Cuda, Err(error)) => bail!("--device cuda: {error}"),
        (_, Ok(())) => Device::cuda_if_available(),
    };
    let reader = source::reader(&args.checkpoint)?;
    let recipe = Recipe::of_manifest(&reader.manifest().config)?;
    let vae = args.vae.as_ref().or(recipe.sample.vae.as_ref());
    let vae = AutoencoderKl::load(vae.context("the checkpoint records no VAE; give --vae DIR")?, device)?;
    if let Some(warning) = recipe.check_vae(&vae)? {
        eprintln!("trainer: warning: {warning}");
    }
    let model = recipe.build_model()?;
    let section = match args.weights {
        Section::Ema => "ema/",
        Section::Model => "model/",
    };
    let weights = load_weights(&reader, &*model, section, device)?;
    let options = SamplingOptions {
        kind: match args.sampler {
            Sampler::Ddpm => SamplerKind::Ddpm,
            Sampler::Ddim => SamplerKind::Ddim,
        },
        steps: args.steps,
        cfg_scale: args.cfg_scale,
        channels: match args.cfg_channels {
            Channels::All => GuidedChannels::All,
            Channels::FirstThree => GuidedChannels::FirstThree,
        },
        seed: args.seed,
    };
    if args.cfg_scale != 1.0 && model.null_label().is_none() {
        bail!("the model was trained without label dropout, so there is no guidance; give --cfg-scale 1");
    }
    let generator = Generator::new(model, &recipe.process(), options, device)?;
    let classes = recipe.model.num_classes;
    if let Some(label) = args.labels.iter().find(|label| !(0..classes).contains(label)) {
        bail!("--labels: {label} is no class; the checkpoint has 0 to {}", classes - 1);
    }
    let cycle = if args.labels.is_empty() { (0..classes).collect() } else { args.labels.clone() };
    let labels: Vec<i64> = cycle.iter().copied().cycle().take(args.num).collect();

    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} images  {per_sec}  eta {eta}")?;
    let progress = ProgressBar::new(labels.len() as u64).with_style(style);
    let mut npz = None;
    let mut shown: Option<ImageBatch> = None;
    for (number, of_batch) in labels.chunks(args.batch).enumerate() {
        let latents = generator.latents(&weights, (number * args.batch) as u64, of_batch);
        let images = ImageBatch::from_tensor(&vae.decode(&(latents / recipe.dataset.scaling_factor))?)?;
        if let (Some(path), None) = (&args.out, &npz) {
            npz = Some(NpzWriter::create(path, labels.len(), images.height, images.width)?);
        }
        if let Some(npz) = &mut npz {
            npz.push(&images)?;
        }
        if args.grid.is_some() {
            shown = Some(extended(shown, images, args.grid_num)?);
        }
        progress.inc(of_batch.len() as u64);
    }
    progress.finish_and_clear();
    if let (Some(npz), Some(path)) = (npz, &args.out) {
        npz.finish(Some(&labels))?;
        println!("{} images: {}", labels.len(), path.display());
    }
    if let (Some(shown), Some(path)) = (shown, &args.grid) {
        Grid::new(&shown, cycle.len().clamp(1, 10), 2)?.write(path)?;
        println!("grid of {} images: {}", shown.count, path.display());
    }
    Ok(())
}

/// `shown` with more images, up to `limit` in all: only those of the grid are kept.
fn extended(shown: Option<ImageBatch>, images: ImageBatch, limit: usize) -> Result<ImageBatch> {
    let [channels, height, width] = [images.channels, images.height, images.width];
    let mut pixels = shown.map(|shown| shown.pixels).unwrap_or_default();
    pixels.extend(images.pixels);
    let image = channels * height * width;
    let count = (pixels.len() / image).min(limit.max(1));
    pixels.truncate(count * image);
    Ok(ImageBatch::new([count, channels, height, width], pixels)?)
}

/// The weights of one section of a checkpoint, without touching the others.
fn load_weights(reader: &CheckpointReader, model: &dyn Model, section: &str, device: Device) -> Result<WeightSet> {
    let mut tensors = HashMap::new();
    for name in reader.names().filter(|name| name.starts_with(section)) {
        let shape: Vec<i64> = reader.shape(name).unwrap_or_default().iter().map(|&side| side as i64).collect();
        let values = Tensor::from_slice(&reader.read_all_f32(name)?).view(shape.as_slice()).to_device(device);
        tensors.insert(name[section.len()..].to_owned(), values);
    }
    Ok(WeightSet::from_named(model, tensors)?)
}
