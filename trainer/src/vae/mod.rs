//! The KL-regularised autoencoder of latent diffusion (`AutoencoderKL` in the Hugging Face diffusers layout).
//!
//! Any folder with that class's `config.json` and safetensors weights loads, with the current or the older names of the
//! attention tensors: `stabilityai/sd-vae-ft-ema` as well as the small VAE of the quickstart. Everything computes in f32.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use tch::{Device, Tensor};

mod coder;
mod config;
mod error;
mod layers;
#[cfg(test)]
mod tests;
mod weights;

pub use config::VaeConfig;
pub use error::VaeError;

use coder::{Decoder, Encoder};
use layers::Conv;
use weights::Weights;

/// Is told the name and value of each intermediate result of a traced call (`enc/down0`, `dec/mid`, …).
pub type Probe<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// The posterior of a batch of images: a diagonal Gaussian per latent element.
#[derive(Debug)]
pub struct Moments {
    /// `[B, latent_channels, H/f, W/f]`.
    pub mean: Tensor,
    /// Same shape; natural logarithm of the variance, clamped to [-30, 20].
    pub logvar: Tensor,
}

impl Moments {
    /// The posterior sample `mean + exp(logvar / 2) · noise` for standard normal `noise` of the mean's shape.
    ///
    /// # Errors
    /// When the shapes differ.
    pub fn sample(&self, noise: &Tensor) -> Result<Tensor, VaeError> {
        Ok(self.mean.f_add(&(&self.logvar * 0.5).f_exp()?.f_mul(noise)?)?)
    }
}

/// An encoder and decoder with their weights on one device.
pub struct AutoencoderKl {
    config: VaeConfig,
    /// Weight file and the SHA-256 of its bytes in hex.
    file: Option<(PathBuf, String)>,
    device: Device,
    encoder: Encoder,
    quant_conv: Option<Conv>,
    post_quant_conv: Option<Conv>,
    decoder: Decoder,
}

impl AutoencoderKl {
    /// Loads `config.json` and `diffusion_pytorch_model[.fp16].safetensors` from the folder `dir`; half-precision weights
    /// become f32.
    ///
    /// # Errors
    /// A missing or truncated file, a config that is not implemented, or all tensors that do not match it.
    pub fn load(dir: &Path, device: Device) -> Result<Self, VaeError> {
        let config = VaeConfig::load(&dir.join("config.json"))?;
        let (path, tensors, digest) = weights::read_folder(dir)?;
        let vae = Self::build(config, tensors, device, &path.display().to_string())?;
        Ok(Self { file: Some((path, digest)), ..vae })
    }

    /// Builds the network from tensors under their names in the weight file, on the CPU.
    ///
    /// # Errors
    /// All tensors that are missing, unexpected or of the wrong shape.
    pub fn from_weights(config: VaeConfig, tensors: HashMap<String, Tensor>) -> Result<Self, VaeError> {
        Self::build(config, tensors, Device::Cpu, "vae weights")
    }

    fn build(
        config: VaeConfig,
        tensors: HashMap<String, Tensor>,
        device: Device,
        origin: &str,
    ) -> Result<Self, VaeError> {
        let mut weights = Weights::new(tensors, device);
        let latent = config.latent_channels;
        let vae = Self {
            encoder: Encoder::new(&mut weights, &config)?,
            quant_conv: match config.use_quant_conv {
                true => Some(Conv::new(&mut weights, "quant_conv", 2 * latent, 2 * latent, 1)?),
                false => None,
            },
            post_quant_conv: match config.use_post_quant_conv {
                true => Some(Conv::new(&mut weights, "post_quant_conv", latent, latent, 1)?),
                false => None,
            },
            decoder: Decoder::new(&mut weights, &config)?,
            config,
            file: None,
            device,
        };
        weights.finish(origin)?;
        Ok(vae)
    }

    /// The config it was built from.
    pub fn config(&self) -> &VaeConfig {
        &self.config
    }

    /// SHA-256 (hex) of the weight file; `None` when built from tensors in memory.
    pub fn digest(&self) -> Option<&str> {
        self.file.as_ref().map(|(_, digest)| digest.as_str())
    }

    /// The weight file; `None` when built from tensors in memory.
    pub fn weights_file(&self) -> Option<&Path> {
        self.file.as_ref().map(|(path, _)| path.as_path())
    }

    /// Where the weights are; inputs must be there too.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The posterior of images.
    ///
    /// # Shapes
    /// `image`: f32 `[B, in_channels, H, W]` in [-1, 1], H and W divisible by [`VaeConfig::factor`].
    ///
    /// # Errors
    /// Another shape, or a refusal by libtorch (out of memory).
    pub fn encode(&self, image: &Tensor) -> Result<Moments, VaeError> {
        self.encode_traced(image, &mut |_, _| {})
    }

    /// [`Self::encode`], telling `probe` every intermediate result.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_traced(&self, image: &Tensor, probe: Probe) -> Result<Moments, VaeError> {
        let (found, channels, factor) = (image.size(), self.config.in_channels, self.config.factor());
        let fits = |side: i64| side > 0 && side % factor == 0;
        if !matches!(found[..], [_, c, h, w] if c == channels && fits(h) && fits(w)) {
            let expected = format!("[B, {channels}, H, W] with H and W multiples of {factor}");
            return Err(VaeError::Input { call: "encode", found, expected });
        }
        let mut moments = self.encoder.forward(image, probe)?;
        if let Some(conv) = &self.quant_conv {
            moments = conv.forward(&moments)?;
        }
        probe("enc/moments", &moments);
        let latent = self.config.latent_channels;
        Ok(Moments {
            mean: moments.f_narrow(1, 0, latent)?,
            logvar: moments.f_narrow(1, latent, latent)?.f_clamp(-30.0, 20.0)?,
        })
    }

    /// The image of an unscaled latent (see [`Self::unscale`]), about in [-1, 1].
    ///
    /// # Shapes
    /// `latent`: f32 `[B, latent_channels, h, w]`; the result is `[B, out_channels, h·factor, w·factor]`.
    ///
    /// # Errors
    /// Another shape, or a refusal by libtorch (out of memory).
    pub fn decode(&self, latent: &Tensor) -> Result<Tensor, VaeError> {
        self.decode_traced(latent, &mut |_, _| {})
    }

    /// [`Self::decode`], telling `probe` every intermediate result.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn decode_traced(&self, latent: &Tensor, probe: Probe) -> Result<Tensor, VaeError> {
        let (found, channels) = (latent.size(), self.config.latent_channels);
        if !matches!(found[..], [_, c, h, w] if c == channels && h > 0 && w > 0) {
            return Err(VaeError::Input { call: "decode", found, expected: format!("[B, {channels}, h, w]") });
        }
        let h = match &self.post_quant_conv {
            Some(conv) => conv.forward(latent)?,
            None => latent.shallow_clone(),
        };
        probe("dec/post_quant", &h);
        self.decoder.forward(&h, probe)
    }

    /// What diffusion trains on: `(latent - shift_factor) · scaling_factor`.
    ///
    /// # Errors
    /// A refusal by libtorch.
    pub fn scale(&self, latent: &Tensor) -> Result<Tensor, VaeError> {
        let shift = self.config.shift_factor.unwrap_or(0.0);
        Ok(latent.f_sub_scalar(shift)?.f_mul_scalar(self.config.scaling_factor)?)
    }

    /// The inverse of [`Self::scale`]: from what diffusion samples to what [`Self::decode`] takes.
    ///
    /// # Errors
    /// A refusal by libtorch.
    pub fn unscale(&self, scaled: &Tensor) -> Result<Tensor, VaeError> {
        let shift = self.config.shift_factor.unwrap_or(0.0);
        Ok(scaled.f_div_scalar(self.config.scaling_factor)?.f_add_scalar(shift)?)
    }
}
