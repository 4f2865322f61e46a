//! `trainer encode`: images to a parquet data set of VAE latents.
//!
//! The source is cut into parts of fixed row ranges, whatever the number of ranks; a rank writes every `world_size`-th part. A
//! part appears whole or not at all, and parts that are there are not made again: the same command continues a run that
//! stopped. Ranks do not talk to each other, so no MPI is needed beyond `mpirun` starting them.

mod folder;
mod idx;
mod part;
mod plan;
mod progress;
mod source;
#[cfg(test)]
mod tests;
mod webdataset;

use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use data_loader::{Dtype, WriterOptions};

pub use source::{ImageSource, Sample, SourceError, open as open_source, open_unlabelled};

use crate::device::DeviceChoice;
use crate::vae::AutoencoderKl;
use part::{Loader, PartEncoder};
use plan::{FORMAT, Recipe, Share};
use progress::Progress;

/// Options of `trainer encode`.
#[derive(Args, Clone, Debug)]
pub struct EncodeArgs {
    /// Where the images are: idx:DIR[:train|test] (MNIST files), folder:DIR (DIR/CLASS/IMAGE.jpg), or tar:GLOB (WebDataset
    /// shards with .jpg/.png/.webp and .cls members; `*` and `{0000..0127}` are understood).
    #[arg(long, value_name = "KIND:PATH")]
    pub source: String,
    /// Folder with the VAE's config.json and diffusion_pytorch_model.safetensors.
    #[arg(long, value_name = "DIR")]
    pub vae: PathBuf,
    /// Folder for the parquet files; made if missing. A run that stopped continues.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Side of the square images that are encoded [default: the VAE's sample_size].
    #[arg(long, value_name = "N")]
    pub image_size: Option<usize>,
    /// Put smaller images into the middle of a black square instead of resizing them.
    #[arg(long)]
    pub pad: bool,
    /// Store the latents of the mirrored images too (for `data.flip = true`).
    #[arg(long)]
    pub mirror: bool,
    /// Images per pass through the VAE.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = positive)]
    pub batch: usize,
    /// Upper bound on the rows of a file; the rows are spread evenly over the files.
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = positive)]
    pub rows_per_file: usize,
    /// Rows of a row group.
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = positive)]
    pub row_group: usize,
    /// Number type of the stored latents.
    #[arg(long, value_enum, default_value_t = StoredDtype::F16)]
    pub dtype: StoredDtype,
    /// Number of classes, where it is more than the labels show.
    #[arg(long, value_name = "N", value_parser = positive)]
    pub num_classes: Option<usize>,
    /// What to do with an image that cannot be read.
    #[arg(long, value_enum, default_value_t = OnError::Fail)]
    pub on_error: OnError,
    /// CPU threads that compute in this process.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = positive)]
    pub threads: usize,
    /// Threads that read and decode images in this process.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = positive)]
    pub loaders: usize,
    /// Where the VAE runs; auto takes a GPU if there is one.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,
    /// This process among several that encode together [default: what mpirun says, else 0].
    #[arg(long, value_name = "R", requires = "world_size")]
    pub rank: Option<usize>,
    /// How many processes encode together [default: what mpirun says, else 1].
    #[arg(long, value_name = "N", requires = "rank")]
    pub world_size: Option<usize>,
}

/// Number type of the stored latents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StoredDtype {
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

/// What to do with an image that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnError {
    /// Stop with an error that names it.
    Fail,
    /// Leave it out, say so, and count it.
    Skip,
}

fn positive(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|&n| n > 0).ok_or_else(|| "expected a whole number, 1 or more".into())
}

/// Encodes this rank's parts of the data set.
///
/// # Errors
/// The first thing that is wrong with the options, the VAE, the source, an image or the output folder. Parts that were
/// finished stay.
pub fn run(args: EncodeArgs) -> anyhow::Result<()> {
    let share = Share::find((args.rank, args.world_size), |name| std::env::var(name).ok())?;
    tch::set_num_threads(args.threads.try_into().context("--threads is too large")?);
    let _no_grad = tch::no_grad_guard();
    let vae = AutoencoderKl::load(&args.vae, args.device.device(share.local_rank)?)?;
    let source = source::open(&args.source)?;
    let recipe = recipe(&args, &vae, source.as_ref())?;
    recipe.claim(&args.out)?;

    let encoder = PartEncoder {
        vae: &vae,
        loader: Loader {
            source: source.as_ref(),
            channels: vae.config().in_channels as usize,
            image_size: recipe.image_size,
            pad: args.pad,
            on_error: args.on_error,
        },
        loaders: args.loaders,
        batch: args.batch,
        writer: WriterOptions {
            scaling_factor: Some(recipe.scaling_factor),
            num_classes: Some(recipe.num_classes),
            vae_digest: Some(recipe.vae_digest.clone()),
            dtype: match args.dtype {
                StoredDtype::F16 => Dtype::F16,
                StoredDtype::F32 => Dtype::F32,
            },
            flipped: args.mirror,
            row_group_rows: args.row_group,
            ..WriterOptions::new(recipe.latent_shape.clone())
        },
    };
    let parts = share.parts(recipe.parts);
    let mut progress = Progress::new(share, parts.clone().map(|part| recipe.part_rows(part).len()).sum());
    let mut skipped_images = 0;
    for part in parts {
        let (path, rows) = (recipe.part_path(&args.out, part), recipe.part_rows(part));
        match recipe.finished_rows(&path) {
            // A part with fewer rows was made with --on-error skip; with `fail` the missing ones must come to light.
            Ok(Some(found)) if found == rows.len() || (found < rows.len() && args.on_error == OnError::Skip) => {
                skipped_images += rows.len() - found;
                progress.found(rows.len());
                continue;
            }
            Ok(None) => {}
            Ok(Some(found)) => {
                progress.say(&format!("{}: holds {found} of {} rows, made again", path.display(), rows.len()))
            }
            Err(reason) => progress.say(&format!("{}: {reason}; made again", path.display())),
        }
        remove_leftovers(&path)?;
        let skipped = encoder.encode(rows, &path, |images| progress.encoded(images)).with_context(|| {
            format!("{}: this part was not written; finished parts stay, the same command continues", path.display())
        })?;
        for error in &skipped {
            progress.say(&format!("left out: {error}"));
        }
        skipped_images += skipped.len();
    }
    let missing = (0..recipe.parts).filter(|&part| !recipe.part_path(&args.out, part).exists()).count();
    let state = match missing {
        0 => format!("all {} parts are in {}", recipe.parts, args.out.display()),
        n => format!("{n} of {} parts are still being written by other ranks", recipe.parts),
    };
    progress.finish(&format!("{skipped_images} left out; {state}"));
    Ok(())
}

/// What the data set will be.
fn recipe(args: &EncodeArgs, vae: &AutoencoderKl, source: &dyn ImageSource) -> anyhow::Result<Recipe> {
    let config = vae.config();
    let image_size = args.image_size.unwrap_or(config.sample_size as usize);
    ensure!(
        image_size > 0 && image_size.is_multiple_of(config.factor() as usize),
        "--image-size = {image_size}, expected a multiple of {} for the VAE in {}",
        config.factor(),
        args.vae.display()
    );
    ensure!(
        matches!(config.in_channels, 1 | 3),
        "{}: `in_channels` = {}, expected 1 (gray) or 3 (RGB) to encode images",
        args.vae.join("config.json").display(),
        config.in_channels
    );
    let found_classes = source.num_classes();
    let num_classes = args.num_classes.unwrap_or(found_classes);
    ensure!(
        num_classes >= found_classes,
        "--num-classes = {num_classes}, but {} has labels up to {}; expected {found_classes} or more",
        args.source,
        found_classes.saturating_sub(1)
    );
    Ok(Recipe {
        format: FORMAT,
        source_digest: source.digest().to_string(),
        rows: source.count(),
        num_classes,
        vae_digest: vae.digest().context("the VAE was not loaded from a file")?.to_string(),
        scaling_factor: config.scaling_factor,
        shift_factor: config.shift_factor.unwrap_or(0.0),
        latent_shape: config.latent_shape(image_size).to_vec(),
        image_size,
        pad: args.pad,
        mirror: args.mirror,
        dtype: match args.dtype {
            StoredDtype::F16 => "f16".into(),
            StoredDtype::F32 => "f32".into(),
        },
        parts: source.count().div_ceil(args.rows_per_file),
        row_group_rows: args.row_group,
    })
}

/// Removes the temporary files of earlier attempts at `path` that were killed.
fn remove_leftovers(path: &Path) -> anyhow::Result<()> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    let start = format!(".{}.", name.to_string_lossy());
    let listing = || format!("{}: cannot list it", folder.display());
    for entry in std::fs::read_dir(folder).with_context(listing)? {
        let entry = entry.with_context(listing)?;
        let found = entry.file_name().to_string_lossy().into_owned();
        if found.starts_with(&start) && found.ends_with(".tmp") {
            std::fs::remove_file(entry.path())
                .with_context(|| format!("{}: cannot remove it", entry.path().display()))?;
        }
    }
    Ok(())
}
