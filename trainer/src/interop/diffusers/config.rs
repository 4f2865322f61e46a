//! The `config.json` of a `DiTTransformer2DModel`.

use super::DiffusersError;
use crate::interop::InteropError;
use crate::model::dit::{Conditioning, DitConfig, Numerics};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// The version whose folders are written; older ones read them, too.
pub(super) const DIFFUSERS_VERSION: &str = "0.42.1";
/// MLP width over hidden width in diffusers; it has no key.
const MLP_RATIO: f64 = 4.0;
/// Share of dropped labels in diffusers; it has no key.
const CLASS_DROPOUT_PROB: f64 = 0.1;

/// The keys that shape the network; a missing key means what it means to diffusers. Keys that a DiT does not read (`norm_num_groups`, …) are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TransformerConfig {
    /// `DiTTransformer2DModel`, or the general `Transformer2DModel` of older folders.
    #[serde(rename = "_class_name")]
    pub class_name: String,
    /// The version that wrote it.
    #[serde(rename = "_diffusers_version", skip_serializing_if = "Option::is_none")]
    pub diffusers_version: Option<Value>,
    /// What diffusers has no key for; keys with an underscore are no arguments to it.
    #[serde(rename = "_ditharos", skip_serializing_if = "Option::is_none")]
    pub recorded: Option<Recorded>,
    /// Heads.
    pub num_attention_heads: i64,
    /// Hidden width over heads.
    pub attention_head_dim: i64,
    /// Channels of the latent.
    pub in_channels: i64,
    /// Channels of the output; as many as the latent's when absent.
    pub out_channels: Option<i64>,
    /// Blocks.
    pub num_layers: i64,
    /// Side of the latent.
    pub sample_size: i64,
    /// Side of a patch.
    pub patch_size: i64,
    /// Classes; the label table has one more row.
    pub num_embeds_ada_norm: Option<i64>,
    /// Only `ada_norm_zero` is a DiT.
    pub norm_type: String,
    /// Epsilon of the LayerNorm before the MLP (the others have 1e-6 hard-coded).
    pub norm_eps: f64,
    /// Only `false` is a DiT.
    pub norm_elementwise_affine: bool,
    /// Only `gelu-approximate` is a DiT.
    pub activation_fn: String,
    /// Only `true` is a DiT.
    pub attention_bias: bool,
    /// Only absent or null is a DiT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cross_attention_dim: Option<i64>,
}

/// What diffusers has no key for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// Classes; the label table may have been filled up.
    pub num_classes: i64,
    /// Share of dropped labels in training.
    pub class_dropout_prob: f64,
    /// [`Numerics::freq_shift`] of the training.
    pub freq_shift: f64,
}

impl Default for TransformerConfig {
    fn default() -> Self {
        Self {
            class_name: "DiTTransformer2DModel".to_owned(),
            diffusers_version: None,
            recorded: None,
            num_attention_heads: 16,
            attention_head_dim: 72,
            in_channels: 4,
            out_channels: None,
            num_layers: 28,
            sample_size: 32,
            patch_size: 2,
            num_embeds_ada_norm: Some(1000),
            norm_type: "ada_norm_zero".to_owned(),
            norm_eps: 1e-5,
            norm_elementwise_affine: false,
            activation_fn: "gelu-approximate".to_owned(),
            attention_bias: true,
            cross_attention_dim: None,
        }
    }
}

impl TransformerConfig {
    /// Reads and checks a `config.json`.
    ///
    /// # Errors
    /// The file, the key, what was found and what was expected.
    pub fn load(path: &Path) -> Result<Self, InteropError> {
        let text = std::fs::read_to_string(path).map_err(InteropError::io(path, "read"))?;
        Ok(Self::from_json(&text, &path.display().to_string())?)
    }

    /// Parses and checks the text of a `config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn from_json(text: &str, origin: &str) -> Result<Self, DiffusersError> {
        let refuse = |reason: String| DiffusersError::Config { origin: origin.to_owned(), reason };
        let config: Self = serde_json::from_str(text)
            .map_err(|error| refuse(format!("not the config of a DiTTransformer2DModel: {error}")))?;
        config.check().map_err(refuse)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let only = |key: &str, found: &str, expected: &[&str]| {
            if expected.contains(&found) {
                return Ok(());
            }
            let expected: Vec<String> = expected.iter().map(|name| format!("{name:?}")).collect();
            Err(format!("`{key}` = {found:?}, expected {}: only DiT with adaLN-Zero is read", expected.join(" or ")))
        };
        only("_class_name", &self.class_name, &["DiTTransformer2DModel", "Transformer2DModel"])?;
        only("norm_type", &self.norm_type, &["ada_norm_zero"])?;
        only("activation_fn", &self.activation_fn, &["gelu-approximate"])?;
        only("attention_bias", &self.attention_bias.to_string(), &["true"])?;
        only("norm_elementwise_affine", &self.norm_elementwise_affine.to_string(), &["false"])?;
        if let Some(width) = self.cross_attention_dim {
            return Err(format!("`cross_attention_dim` = {width}, expected null: a DiT has no cross-attention"));
        }
        let Some(classes) = self.num_embeds_ada_norm else {
            return Err("`num_embeds_ada_norm` is null, expected the number of classes".to_owned());
        };
        for (key, value) in [
            ("num_attention_heads", self.num_attention_heads),
            ("attention_head_dim", self.attention_head_dim),
            ("in_channels", self.in_channels),
            ("num_layers", self.num_layers),
            ("sample_size", self.sample_size),
            ("patch_size", self.patch_size),
            ("num_embeds_ada_norm", classes),
        ] {
            if !(1..=1 << 24).contains(&value) {
                return Err(format!("`{key}` = {value}, expected 1 or more"));
            }
        }
        let (found, channels) = (self.out_channels(), self.in_channels);
        if found != channels && found != 2 * channels {
            return Err(format!(
                "`out_channels` = {found}, expected `in_channels` = {channels} or, with a learned variance, {}",
                2 * channels
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return Err(format!("`norm_eps` = {}, expected a small positive number", self.norm_eps));
        }
        if let Some(recorded) = &self.recorded
            && !((1..=classes).contains(&recorded.num_classes)
                && recorded.class_dropout_prob > 0.0
                && recorded.class_dropout_prob <= 1.0)
        {
            return Err(format!("`_ditharos` = {recorded:?} contradicts `num_embeds_ada_norm` = {classes}"));
        }
        Ok(())
    }

    fn out_channels(&self) -> i64 {
        self.out_channels.unwrap_or(self.in_channels)
    }

    /// Classes without rows that only fill up the label table, where the folder says so.
    pub(super) fn recorded_classes(&self) -> Option<i64> {
        self.recorded.as_ref().map(|recorded| recorded.num_classes)
    }

    /// The model with all rows of the label table as classes.
    pub(super) fn dit(&self) -> DitConfig {
        DitConfig {
            input_size: self.sample_size,
            in_channels: self.in_channels,
            patch_size: self.patch_size,
            hidden_size: self.num_attention_heads * self.attention_head_dim,
            depth: self.num_layers,
            num_heads: self.num_attention_heads,
            mlp_ratio: MLP_RATIO,
            class_dropout_prob: self
                .recorded
                .as_ref()
                .map_or(CLASS_DROPOUT_PROB, |recorded| recorded.class_dropout_prob),
            num_classes: self.num_embeds_ada_norm.unwrap_or_default(),
            learn_sigma: self.out_channels() == 2 * self.in_channels,
            conditioning: Conditioning::AdaLnZero,
            // Where nobody recorded them, `norm_eps` says nothing: published folders hold converted official weights under
            // diffusers' default.
            numerics: self.recorded.as_ref().map_or_else(Numerics::default, |recorded| Numerics {
                freq_shift: recorded.freq_shift,
                mlp_norm_eps: self.norm_eps,
            }),
        }
    }

    /// The config of `model` with a label table of `label_rows` rows.
    ///
    /// # Errors
    /// [`DiffusersError::NotRepresentable`] names what DiTTransformer2DModel has no parameter for.
    pub fn of(model: &DitConfig, label_rows: i64) -> Result<Self, DiffusersError> {
        let refuse = |what: String, why: &str| Err(DiffusersError::NotRepresentable { what, why: why.to_owned() });
        if model.conditioning != Conditioning::AdaLnZero {
            return refuse(
                format!("`model.conditioning` = {:?}", model.conditioning),
                "a DiTTransformer2DModel is conditioned by adaLN-Zero only",
            );
        }
        if model.mlp_ratio != MLP_RATIO {
            return refuse(
                format!("`model.mlp_ratio` = {}", model.mlp_ratio),
                "the MLP of a DiTTransformer2DModel is 4 times as wide as the model",
            );
        }
        if model.class_dropout_prob == 0.0 {
            return refuse(
                "`model.class_dropout_prob` = 0".to_owned(),
                "the label table of a DiTTransformer2DModel always has a row for the null label, and this model has none",
            );
        }
        Ok(Self {
            diffusers_version: Some(DIFFUSERS_VERSION.into()),
            recorded: Some(Recorded {
                num_classes: model.num_classes,
                class_dropout_prob: model.class_dropout_prob,
                freq_shift: model.numerics.freq_shift,
            }),
            num_attention_heads: model.num_heads,
            attention_head_dim: model.hidden_size / model.num_heads,
            in_channels: model.in_channels,
            out_channels: Some(model.in_channels * if model.learn_sigma { 2 } else { 1 }),
            num_layers: model.depth,
            sample_size: model.input_size,
            patch_size: model.patch_size,
            num_embeds_ada_norm: Some(label_rows - 1),
            norm_eps: model.numerics.mlp_norm_eps,
            ..Self::default()
        })
    }
}
