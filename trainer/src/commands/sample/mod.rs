//! `trainer sample`: images from a checkpoint, drawn by one process or by all ranks of a world.

mod options;
mod output;

use super::ranks::{ConfigArgs, load_weights, open_together, together};
use crate::device::DeviceChoice;
use crate::engine::agree::agree;
use crate::engine::share::share_out;
use crate::engine::stop::StopFlag;
use crate::ffi;
use crate::images::ImageBatch;
use crate::model::WeightSet;
use crate::recipe::Recipe;
use crate::sampling::{Generator, SamplingOptions};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result, bail};
use checkpoint::CheckpointReader;
use collective::Collective;
use configs::RunConfig;
use data_loader::draws::{Key, Purpose};
use options::SamplerArgs;
use output::Output;
use rand::RngExt;
use std::path::PathBuf;
use std::time::Duration;

/// Options of `trainer sample`.
#[derive(clap::Args)]
pub struct SampleArgs {
    /// A run folder (its newest valid checkpoint), or one checkpoint of it (`<run>/checkpoints/step-000001000`,
    /// `<run>/checkpoints/best`); the run of --config when not given.
    #[arg(long, value_name = "URL", required_unless_present = "config")]
    checkpoint: Option<String>,
    #[command(flatten)]
    run: ConfigArgs,
    /// Which weights: ema, model, or the section of a further EMA.
    #[arg(long, value_name = "SECTION", default_value = "ema")]
    weights: String,
    /// How many images.
    #[arg(long, default_value_t = 40)]
    num: usize,
    /// Labels; all classes when not given.
    #[arg(long, value_delimiter = ',', value_name = "LABEL,…")]
    labels: Vec<i64>,
    /// How labels come to the images: in turn, or drawn from the labels with equal chances, as the field's evaluations
    /// do.
    #[arg(long, value_enum, default_value_t = LabelDraw::Cycle)]
    label_draw: LabelDraw,
    #[command(flatten)]
    sampler: SamplerArgs,
    /// Seed of the noise and of drawn labels. Sample i depends on seed, i and its label (and, in the last bits, on
    /// --batch and --threads).
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Images drawn at once.
    #[arg(long, default_value_t = 100)]
    batch: usize,
    /// AutoencoderKL folder; the one of --config or the one recorded in the checkpoint when not given.
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
    /// CPU threads [default: all cores; with --config or several ranks train.threads_per_rank of the checkpoint, so
    /// that the images do not depend on the machine].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum LabelDraw {
    Cycle,
    Uniform,
}

/// Draws the images, together with the other ranks of the world where there are any, and gives the exit code.
///
/// # Errors
/// A config that cannot be used. Later failures are reported here, by one rank, because the others must be ended too.
pub fn sample(args: &SampleArgs) -> Result<i32> {
    together(&args.run, Duration::ZERO, |config, collective| draw(args, config, collective))
}

fn draw(args: &SampleArgs, config: Option<&RunConfig>, collective: &dyn Collective) -> Result<()> {
    let url = args.checkpoint.as_ref().or(config.map(|config| &config.run.url));
    let checked = args.check().and_then(|()| url.context("give --checkpoint URL or --config FILE"));
    let url = agree(collective, checked)?;
    let stop = agree(collective, StopFlag::install().context("installing signal handlers"))?;
    let reader = open_together(url, collective)?;
    let Prepared { recipe, vae, weights, generator, labels, columns } =
        agree(collective, Prepared::new(args, config, &reader, collective))?;

    let output = match collective.rank() {
        0 => Output::new(labels.clone(), args.out.as_deref(), args.grid.as_deref(), args.grid_num, columns).map(Some),
        _ => Ok(None),
    };
    let mut output = agree(collective, output)?;
    let mut draw = |number: usize| {
        let first = number * args.batch;
        let of_batch = &labels[first..labels.len().min(first + args.batch)];
        let latents = generator.latents(&weights, first as u64, of_batch)? / recipe.dataset.scaling_factor;
        if stop.is_raised() {
            bail!("stopped on request; nothing was written");
        }
        Ok(ImageBatch::from_tensor(&vae.decode(&latents)?)?)
    };
    let mut take = |images: ImageBatch| output.as_mut().map_or(Ok(()), |output| output.take(images));
    share_out(collective, labels.len().div_ceil(args.batch), &mut draw, &mut take)?;
    agree(collective, output.map_or(Ok(()), Output::finish))
}

/// What a rank has before it draws.
struct Prepared {
    recipe: Recipe,
    vae: AutoencoderKl,
    weights: WeightSet,
    generator: Generator,
    /// One an image.
    labels: Vec<i64>,
    /// Of a grid.
    columns: usize,
}

impl Prepared {
    fn new(
        args: &SampleArgs,
        config: Option<&RunConfig>,
        reader: &CheckpointReader,
        collective: &dyn Collective,
    ) -> Result<Self> {
        let record = &reader.manifest().config;
        let recorded_threads = || record["train"]["threads_per_rank"].as_i64().map(|threads| threads as i32);
        let is_fixed = config.is_some() || collective.world_size() > 1;
        if let Some(threads) = args.threads.or_else(|| recorded_threads().filter(|_| is_fixed)) {
            tch::set_num_threads(threads.max(1));
            tch::set_num_interop_threads(1);
        }
        ffi::set_deterministic(record["train"]["tf32"].as_bool().unwrap_or(false))?;
        let device = args.device.device(collective.local_rank())?;
        let recipe = Recipe::of_manifest(record)?;
        let of_config = config.and_then(|config| config.sample.vae.as_ref());
        let vae = args.vae.as_ref().or(of_config).or(recipe.sample.vae.as_ref());
        let vae = AutoencoderKl::load(vae.context("the checkpoint records no VAE; give --vae DIR")?, device)?;
        if let Some(warning) = recipe.check_vae(&vae)?.filter(|_| collective.rank() == 0) {
            eprintln!("trainer: warning: {warning}");
        }
        let process = recipe.process();
        let sampler = args.sampler.sampler(&process)?;
        let options = SamplingOptions { sampler, guidance: args.sampler.guidance()?, seed: args.seed };
        let model = recipe.build_model()?;
        let generator = Generator::new(model.clone(), &process, options, device)?;
        let choice = args.choice_of_labels(recipe.model.num_classes)?;
        let columns = choice.len().clamp(1, 10);
        let weights = load_weights(reader, &*model, &args.weights, device)?;
        Ok(Self { labels: args.labels_of(&choice), columns, recipe, vae, weights, generator })
    }
}

impl SampleArgs {
    fn check(&self) -> Result<()> {
        if self.out.is_none() && self.grid.is_none() {
            bail!("nothing to write: give --out FILE.npz, --grid FILE.png or both");
        }
        if self.num == 0 || self.batch == 0 {
            bail!("--num and --batch must be at least 1");
        }
        Ok(())
    }

    /// The labels that may occur.
    fn choice_of_labels(&self, classes: i64) -> Result<Vec<i64>> {
        if let Some(label) = self.labels.iter().find(|label| !(0..classes).contains(label)) {
            bail!("--labels: {label} is no class; the checkpoint has 0 to {}", classes - 1);
        }
        Ok(if self.labels.is_empty() { (0..classes).collect() } else { self.labels.clone() })
    }

    /// The label of every image.
    fn labels_of(&self, choice: &[i64]) -> Vec<i64> {
        let drawn = |number: usize| {
            let key = Key::new(self.seed, Purpose::SampleLabel, number as u64);
            choice[key.rng().random_range(0..choice.len())]
        };
        match self.label_draw {
            LabelDraw::Cycle => choice.iter().copied().cycle().take(self.num).collect(),
            LabelDraw::Uniform => (0..self.num).map(drawn).collect(),
        }
    }
}
