//! `trainer preview`: what the latents of a data set decode to.

use crate::device::DeviceChoice;
use crate::images::{Grid, ImageBatch};
use crate::vae::AutoencoderKl;
use anyhow::{Context, Result, bail};
use data_loader::{LatentDataset, RowRun};
use std::path::PathBuf;
use tch::Tensor;

/// Frames of a video that are shown, side by side.
const MAX_FRAMES: usize = 8;
/// Black, in what the decoder gives.
const BLACK: f64 = -1.0;

/// Options of `trainer preview`.
#[derive(clap::Args)]
pub struct PreviewArgs {
    /// A .parquet file, a folder, or a URL of a data set.
    url: String,
    /// The VAE that made the latents: a folder in diffusers' layout.
    #[arg(long, value_name = "DIR")]
    vae: PathBuf,
    /// The PNG file to write.
    #[arg(long, value_name = "FILE.png")]
    out: PathBuf,
    /// Rows, evenly spread over the data set; of each a picture, or a line of frames.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    num: u64,
    /// What the stored latents were multiplied by after encoding, where that was done before they were stored.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    stored_scale: f64,
    /// Name of a column, as `latent_mean=mu`.
    #[arg(long = "column", value_name = "KEY=NAME")]
    columns: Vec<String>,
    /// CPU threads [default: all cores].
    #[arg(long, value_parser = clap::value_parser!(i32).range(1..))]
    threads: Option<i32>,
    /// Where to compute.
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    device: DeviceChoice,
}

/// Decodes rows from all over the data set and writes them as a grid.
///
/// # Errors
/// No such data set or VAE, latents that the VAE does not take, no place to write to.
pub fn preview(args: &PreviewArgs) -> Result<()> {
    if !(args.stored_scale.is_finite() && args.stored_scale > 0.0) {
        bail!("--stored-scale {}: expected a positive number", args.stored_scale);
    }
    if let Some(threads) = args.threads {
        tch::set_num_threads(threads);
    }
    let device = args.device.device(0)?;
    let columns = configs::Columns::from_pairs(&args.columns).map_err(anyhow::Error::msg)?;
    let dataset = LatentDataset::open(&args.url, &columns)?;
    let vae = AutoencoderKl::load(&args.vae, device).context("--vae")?;
    let encoder = dataset.meta().vae_digest.as_deref();
    if let (Some(found), Some(expected)) = (vae.digest(), encoder)
        && found != expected
    {
        eprintln!(
            "trainer: warning: the latents were made by the VAE {expected}, and {} is {found}",
            args.vae.display()
        );
    }
    let runs: Vec<RowRun> =
        dataset.spread_rows(args.num).into_iter().map(|first_row| RowRun { first_row, rows: 1 }).collect();
    let block = dataset.read(&runs)?;
    let mut pictures = Vec::new();
    let mut columns = (block.len() as f64).sqrt().ceil() as usize;
    for row in 0..block.len() {
        let mut latent = vec![0f32; block.latent_numel(row)];
        block.latent(0, row, &mut latent);
        let shape: Vec<i64> = block.latent_shape(row).iter().map(|&side| side as i64).collect();
        let latent = (Tensor::f_from_slice(&latent)?.f_view(&shape[..])? / args.stored_scale).f_to_device(device)?;
        let frames = match shape[..] {
            [_, _, _] => vec![latent],
            [_, frames, _, _] => {
                let shown = (frames as usize).min(MAX_FRAMES);
                columns = columns.max(shown);
                let frame = |i: usize| latent.f_select(1, i as i64 * frames / shown as i64);
                (0..shown).map(frame).collect::<Result<Vec<_>, _>>()?
            }
            _ => bail!(
                "{}: latents of shape {shape:?} cannot be shown; expected [channels, height, width] or [channels, frames, height, width]",
                dataset.name()
            ),
        };
        for frame in frames {
            pictures.push(vae.decode(&frame.f_unsqueeze(0)?).with_context(|| dataset.name().to_owned())?);
        }
    }
    let side = |dim: usize| pictures.iter().map(|picture| picture.size()[dim]).max().unwrap_or(0);
    let (height, width) = (side(2), side(3));
    let pad = |picture: &Tensor| {
        let size = picture.size();
        // It pads with zeros.
        picture.f_sub_scalar(BLACK)?.f_constant_pad_nd([0, width - size[3], 0, height - size[2]])?.f_add_scalar(BLACK)
    };
    let padded = pictures.iter().map(pad).collect::<Result<Vec<_>, _>>()?;
    let images = ImageBatch::from_tensor(&Tensor::f_cat(&padded, 0)?)?;
    Grid::new(&images, columns, 2)?.write(&args.out)?;
    eprintln!("trainer: {}: {} pictures of {height} × {width} pixels", args.out.display(), images.count);
    Ok(())
}
