//! The `config.json` of a diffusers AutoencoderKL folder.

use std::path::Path;

use serde::Deserialize;

use super::VaeError;

/// The keys of `config.json` that shape the network; a missing key means what it means to diffusers.
/// Keys that only concern other software (`sample_size`'s tiling, `force_upcast`, names starting with `_`) are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    /// Channels of the image that is encoded: 1 gray, 3 RGB.
    pub in_channels: i64,
    /// Channels of the image that is decoded.
    pub out_channels: i64,
    /// One name per encoder level; all must be `DownEncoderBlock2D`.
    pub down_block_types: Vec<String>,
    /// One name per decoder level; all must be `UpDecoderBlock2D`.
    pub up_block_types: Vec<String>,
    /// Channels per level, finest first. There are `len - 1` halvings.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks per encoder level (the decoder has one more).
    pub layers_per_block: usize,
    /// Activation; only `silu` (also called `swish`).
    pub act_fn: String,
    /// Channels of the latent.
    pub latent_channels: i64,
    /// Groups of every group norm.
    pub norm_num_groups: i64,
    /// Side of the images that the VAE was trained on.
    pub sample_size: i64,
    /// Diffusion trains on `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    /// See [`Self::scaling_factor`]; absent means 0.
    pub shift_factor: Option<f64>,
    /// Per-channel statistics of some video pipelines; refused when present.
    pub latents_mean: Option<Vec<f64>>,
    /// See [`Self::latents_mean`].
    pub latents_std: Option<Vec<f64>>,
    /// Whether a 1×1 convolution follows the encoder.
    pub use_quant_conv: bool,
    /// Whether a 1×1 convolution precedes the decoder.
    pub use_post_quant_conv: bool,
    /// Whether the middle blocks contain self-attention.
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into()],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            sample_size: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

impl VaeConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// The file, the key, what was found and what was expected.
    pub fn load(path: &Path) -> Result<Self, VaeError> {
        let text = std::fs::read_to_string(path).map_err(|reason| VaeError::Read { path: path.into(), reason })?;
        Self::from_json(&text, &path.display().to_string())
    }

    /// Parses and checks the text of a `config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_json(text: &str, origin: &str) -> Result<Self, VaeError> {
        let refuse = |reason: String| VaeError::Config { origin: origin.into(), reason };
        let json: serde_json::Value = serde_json::from_str(text).map_err(|e| refuse(format!("not valid JSON: {e}")))?;
        if let Some(class) = json.get("_class_name").and_then(|c| c.as_str())
            && class != "AutoencoderKL"
        {
            return Err(refuse(format!("`_class_name` = {class:?}, expected \"AutoencoderKL\"")));
        }
        let config: Self =
            serde_json::from_value(json).map_err(|e| refuse(format!("not an AutoencoderKL config: {e}")))?;
        config.check().map_err(refuse)?;
        Ok(config)
    }

    /// Pixels per latent element along each side.
    pub fn factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    /// The shape `[latent_channels, side / factor, side / factor]` of the latent of a square image.
    pub fn latent_shape(&self, image_size: usize) -> [usize; 3] {
        let side = image_size / self.factor() as usize;
        [self.latent_channels as usize, side, side]
    }

    fn check(&self) -> Result<(), String> {
        let levels = self.block_out_channels.len();
        if levels == 0 || levels > 16 {
            return Err(format!("`block_out_channels` has {levels} entries, expected 1 to 16"));
        }
        for (key, types, known) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            if types.len() != levels {
                return Err(format!("`{key}` has {} entries, expected {levels} as `block_out_channels`", types.len()));
            }
            if let Some(other) = types.iter().find(|t| *t != known) {
                return Err(format!("`{key}` contains {other:?}; only {known:?} is implemented"));
            }
        }
        if !matches!(self.act_fn.as_str(), "silu" | "swish") {
            return Err(format!("`act_fn` = {:?}; only \"silu\" is implemented", self.act_fn));
        }
        for (key, value) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.norm_num_groups),
            ("layers_per_block", self.layers_per_block as i64),
            ("sample_size", self.sample_size),
        ] {
            if !(1..=1 << 20).contains(&value) {
                return Err(format!("`{key}` = {value}, expected 1 or more"));
            }
        }
        let groups = self.norm_num_groups;
        if let Some(odd) = self.block_out_channels.iter().find(|c| **c < 1 || **c % groups != 0) {
            return Err(format!(
                "`block_out_channels` contains {odd}, expected multiples of `norm_num_groups` = {groups}"
            ));
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0) {
            return Err(format!("`scaling_factor` = {}, expected a finite non-zero number", self.scaling_factor));
        }
        if self.shift_factor.is_some_and(|s| !s.is_finite()) {
            return Err(format!("`shift_factor` = {:?}, expected a finite number", self.shift_factor));
        }
        if self.latents_mean.is_some() || self.latents_std.is_some() {
            return Err("`latents_mean`/`latents_std` are set; only `scaling_factor` and `shift_factor` \
                        normalisation is implemented"
                .into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn refused(json: &str) -> String {
        VaeConfig::from_json(json, "config.json").unwrap_err().to_string()
    }

    #[test]
    fn a_missing_key_means_what_it_means_to_diffusers() {
        let config = VaeConfig::from_json(r#"{"_class_name": "AutoencoderKL", "in_channels": 1}"#, "x").unwrap();
        assert_eq!(config, VaeConfig { in_channels: 1, ..VaeConfig::default() });
        assert_eq!((config.factor(), config.scaling_factor), (1, 0.18215));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        for (json, named) in [
            (r#"{"down_block_types": ["AttnDownEncoderBlock2D"]}"#, "AttnDownEncoderBlock2D"),
            (r#"{"up_block_types": ["AttnUpDecoderBlock2D"]}"#, "AttnUpDecoderBlock2D"),
            (r#"{"act_fn": "gelu"}"#, "gelu"),
            (r#"{"_class_name": "VQModel"}"#, "VQModel"),
            (r#"{"latents_mean": [0, 0, 0, 0]}"#, "latents_mean"),
            (r#"{"block_out_channels": [48]}"#, "48"),
            (r#"{"block_out_channels": [32, 64]}"#, "down_block_types"),
            (r#"{"layers_per_block": "two"}"#, "two"),
            (r#"{"scaling_factor": 0}"#, "scaling_factor"),
            ("{", "not valid JSON"),
        ] {
            let message = refused(json);
            assert!(message.starts_with("config.json: ") && message.contains(named), "{message}");
        }
    }
}
