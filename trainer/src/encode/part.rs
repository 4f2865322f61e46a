//! Encodes one part: loader threads decode images ahead, this thread runs the VAE and writes rows in source order.

use std::ops::Range;
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};

use anyhow::Context;
use data_loader::{LatentRow, LatentWriter, WriterOptions};
use tch::{Device, Kind, Tensor};

use super::OnError;
use super::source::{ImageSource, SourceError};
use crate::vae::{AutoencoderKl, Moments};

/// Batches that each loader thread may have ready.
const AHEAD: usize = 2;

/// How images become latents; the same for all parts.
pub(super) struct PartEncoder<'a> {
    pub vae: &'a AutoencoderKl,
    pub loader: Loader<'a>,
    pub loaders: usize,
    pub batch: usize,
    pub writer: WriterOptions,
}

/// How files become the pixels of a batch; shared by the loader threads (which the VAE's tensors cannot be).
pub(super) struct Loader<'a> {
    pub source: &'a dyn ImageSource,
    pub channels: usize,
    pub image_size: usize,
    pub pad: bool,
    pub on_error: OnError,
}

/// Images ready for the VAE.
#[derive(Default)]
struct Loaded {
    ids: Vec<String>,
    labels: Vec<i64>,
    /// `[ids.len(), channels, image_size, image_size]`.
    pixels: Vec<u8>,
    skipped: Vec<SourceError>,
}

/// Latents of a batch on the host, `[B, numel]` each.
struct Latents {
    mean: Vec<f32>,
    logvar: Vec<f32>,
}

impl PartEncoder<'_> {
    /// Encodes the images `rows` into the file `path`, telling `progress` the number of images after each batch. Returns the
    /// errors of the images that were passed over.
    ///
    /// # Errors
    /// The first image that cannot be read (with `on_error = fail`), or that of the VAE or the disk; no file appears then.
    pub(super) fn encode(
        &self,
        rows: Range<usize>,
        path: &Path,
        mut progress: impl FnMut(usize),
    ) -> anyhow::Result<Vec<SourceError>> {
        let mut writer = LatentWriter::create(path, self.writer.clone())?;
        let mut skipped = Vec::new();
        let starts: Vec<usize> = rows.clone().step_by(self.batch).collect();
        let loaders = self.loaders.min(starts.len()).max(1);
        std::thread::scope(|scope| -> anyhow::Result<()> {
            // Loader `l` prepares batches l, l + loaders, …; taking them in turn restores the order. When this thread returns
            // early the receivers are dropped, sends fail and the loaders end.
            let receivers: Vec<Receiver<_>> = (0..loaders)
                .map(|loader| {
                    let (sender, receiver) = sync_channel(AHEAD);
                    let (files, batch) = (&self.loader, self.batch);
                    let (starts, end) = (&starts, rows.end);
                    scope.spawn(move || {
                        for &start in starts.iter().skip(loader).step_by(loaders) {
                            let loaded = files.load(start..end.min(start + batch));
                            if sender.send(loaded).is_err() {
                                break;
                            }
                        }
                    });
                    receiver
                })
                .collect();
            for (batch, &start) in starts.iter().enumerate() {
                let loaded = receivers[batch % loaders].recv().context("a loader thread ended early")??;
                self.write(&loaded, &mut writer)?;
                skipped.extend(loaded.skipped);
                progress(rows.end.min(start + self.batch) - start);
            }
            Ok(())
        })?;
        writer.finish()?;
        Ok(skipped)
    }

    /// Runs the VAE on a batch and appends its rows.
    fn write(&self, loaded: &Loaded, writer: &mut LatentWriter) -> anyhow::Result<()> {
        if loaded.ids.is_empty() {
            return Ok(());
        }
        let (count, side) = (loaded.ids.len() as i64, self.loader.image_size as i64);
        let shape = [count, self.vae.config().in_channels, side, side];
        let images = Tensor::f_from_data_size(&loaded.pixels, &shape, Kind::Uint8)?
            .f_to_device(self.vae.device())?
            .f_to_kind(Kind::Float)?
            .f_div_scalar(127.5)?
            .f_sub_scalar(1.0)?;
        let straight = self.latents(&self.vae.encode(&images)?)?;
        let mirrored = match self.writer.flipped {
            true => Some(self.latents(&self.vae.encode(&images.f_flip([3])?)?)?),
            false => None,
        };
        let numel = straight.mean.len() / loaded.ids.len();
        for (i, (id, &label)) in loaded.ids.iter().zip(&loaded.labels).enumerate() {
            let at = i * numel..(i + 1) * numel;
            let flipped = mirrored.as_ref().map(|m| (&m.mean[at.clone()], &m.logvar[at.clone()]));
            writer.push(LatentRow {
                mean: &straight.mean[at.clone()],
                logvar: &straight.logvar[at],
                flipped,
                label,
                id,
            })?;
        }
        Ok(())
    }

    fn latents(&self, moments: &Moments) -> anyhow::Result<Latents> {
        let host = |tensor: &Tensor| -> anyhow::Result<Vec<f32>> {
            let tensor = tensor.f_to_device(Device::Cpu)?.f_contiguous()?;
            let mut values = vec![0f32; tensor.numel()];
            let numel = values.len();
            tensor.f_copy_data(&mut values, numel)?;
            Ok(values)
        };
        let shift = self.vae.config().shift_factor.unwrap_or(0.0);
        Ok(Latents { mean: host(&moments.mean.f_sub_scalar(shift)?)?, logvar: host(&moments.logvar)? })
    }
}

impl Loader<'_> {
    /// Reads and crops or pads the images of one batch.
    fn load(&self, rows: Range<usize>) -> Result<Loaded, SourceError> {
        let channels = self.channels;
        let mut loaded = Loaded::default();
        loaded.pixels.reserve(rows.len() * channels * self.image_size * self.image_size);
        for index in rows {
            let picture = self.source.get(index).and_then(|sample| {
                let picture = sample.picture.into_channels(channels);
                let fitted = if self.pad { picture.pad(self.image_size) } else { picture.centre_crop(self.image_size) };
                match fitted {
                    Ok(fitted) => Ok((sample.id, sample.label, fitted)),
                    Err(e) => Err(SourceError::Image { name: sample.id, reason: e.to_string() }),
                }
            });
            match picture {
                Ok((id, label, picture)) => {
                    loaded.ids.push(id);
                    loaded.labels.push(label);
                    for channel in 0..channels {
                        loaded.pixels.extend(picture.pixels.iter().skip(channel).step_by(channels));
                    }
                }
                Err(error @ SourceError::Image { .. }) if self.on_error == OnError::Skip => loaded.skipped.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(loaded)
    }
}
