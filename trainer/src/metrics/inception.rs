//! The Inception-v3 of 2015-12-05, which the field's FID is defined by.
//!
//! It differs from the Inception-v3 of the paper and of torchvision: 1008 outputs, average pools that leave the padding out
//! of the mean, a max pool in the last block, and its own weights. Batch norms are folded into the convolutions.

use super::MetricsError;
use super::blocks::{Conv, Mixed};
use super::resize::resize_bilinear_tf1;
use super::weights::{InceptionWeights, read};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// Side of the pictures that the network sees.
const SIZE: i64 = 299;
/// Values of a picture's pool features.
pub const POOL_FEATURES: i64 = 2048;
/// Channels of `mixed_6/conv` that make the spatial features.
const SPATIAL_CHANNELS: i64 = 7;
/// Values of a picture's spatial features: 17 × 17 positions.
pub const SPATIAL_FEATURES: i64 = 17 * 17 * SPATIAL_CHANNELS;
/// Outputs of the classifier.
const CLASSES: i64 = 1008;

/// What the network says of N pictures; f32 on its device.
pub struct Features {
    /// `pool_3`: `[N, 2048]`.
    pub pool: Tensor,
    /// The first seven channels of `mixed_6/conv`: `[N, 2023]`, of 17 × 17 × 7 with the channel varying fastest (the order of
    /// published sFID statistics).
    pub spatial: Tensor,
}

/// The network.
pub struct Inception {
    stem: [Conv; 5],
    /// Mixed_5b to Mixed_6c.
    lower: Vec<Mixed>,
    mixed_6d: Mixed,
    /// Mixed_6e to Mixed_7c.
    upper: Vec<Mixed>,
    /// `[1008, 2048]`
    classifier: Tensor,
    device: Device,
    digest: Option<String>,
}

impl Inception {
    /// Loads the weights from a `.pth` (`pt_inception-2015-12-05-6726825d.pth` of pytorch-fid) or `.safetensors` file with
    /// the same names.
    ///
    /// # Errors
    /// An unreadable file, or all tensors that are missing, unexpected or of the wrong shape.
    pub fn load(path: &Path, device: Device) -> Result<Self, MetricsError> {
        let (tensors, digest) = read(path)?;
        let inception = Self::build(tensors, device, &path.display().to_string())?;
        Ok(Self { digest: Some(digest), ..inception })
    }

    /// Builds the network from tensors under pytorch-fid's names.
    ///
    /// # Errors
    /// All tensors that are missing, unexpected or of the wrong shape.
    pub fn from_weights(tensors: BTreeMap<String, Tensor>, device: Device) -> Result<Self, MetricsError> {
        Self::build(tensors, device, "inception weights")
    }

    fn build(tensors: BTreeMap<String, Tensor>, device: Device, origin: &str) -> Result<Self, MetricsError> {
        let _no_grad = tch::no_grad_guard();
        let mut weights = InceptionWeights::new(tensors, device);
        let w = &mut weights;
        let inception = Self {
            stem: [
                Conv::new(w, "Conv2d_1a_3x3", 3, 32, [3, 3], 2, [0, 0])?,
                Conv::new(w, "Conv2d_2a_3x3", 32, 32, [3, 3], 1, [0, 0])?,
                Conv::new(w, "Conv2d_2b_3x3", 32, 64, [3, 3], 1, [1, 1])?,
                Conv::new(w, "Conv2d_3b_1x1", 64, 80, [1, 1], 1, [0, 0])?,
                Conv::new(w, "Conv2d_4a_3x3", 80, 192, [3, 3], 1, [0, 0])?,
            ],
            lower: vec![
                Mixed::a(w, "Mixed_5b", 192, 32)?,
                Mixed::a(w, "Mixed_5c", 256, 64)?,
                Mixed::a(w, "Mixed_5d", 288, 64)?,
                Mixed::b(w, "Mixed_6a", 288)?,
                Mixed::c(w, "Mixed_6b", 768, 128)?,
                Mixed::c(w, "Mixed_6c", 768, 160)?,
            ],
            mixed_6d: Mixed::c(w, "Mixed_6d", 768, 160)?,
            upper: vec![
                Mixed::c(w, "Mixed_6e", 768, 192)?,
                Mixed::d(w, "Mixed_7a", 768)?,
                Mixed::e(w, "Mixed_7b", 1280, false)?,
                Mixed::e(w, "Mixed_7c", 2048, true)?,
            ],
            classifier: w.take("fc.weight", &[CLASSES, POOL_FEATURES])?,
            device,
            digest: None,
        };
        weights.finish(origin)?;
        Ok(inception)
    }

    /// SHA-256 (hex) of the weight file; `None` when built from tensors in memory.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The features of pictures of any one size, resized as the graph does.
    ///
    /// # Shapes
    /// `images`: uint8 `[N, 3, H, W]`, RGB in 0..=255, any device.
    ///
    /// # Errors
    /// A refusal by libtorch (another shape, out of memory).
    pub fn features(&self, images: &Tensor) -> Result<Features, MetricsError> {
        let _no_grad = tch::no_grad_guard();
        let pixels = images.f_to_device(self.device)?.f_to_kind(Kind::Float)?;
        let mut x = ((resize_bilinear_tf1(&pixels, SIZE)? - 128.0) / 128.0).f_contiguous()?;
        let [conv_1a, conv_2a, conv_2b, conv_3b, conv_4a] = &self.stem;
        for conv in [conv_1a, conv_2a, conv_2b] {
            x = conv.forward(&x)?;
        }
        x = max_pool(&x)?;
        for conv in [conv_3b, conv_4a] {
            x = conv.forward(&x)?;
        }
        x = max_pool(&x)?;
        for mixed in &self.lower {
            x = mixed.forward(&x)?;
        }
        let branches = self.mixed_6d.branches(&x)?;
        let spatial = branches[0].f_narrow(1, 0, SPATIAL_CHANNELS)?;
        x = Tensor::f_cat(&branches, 1)?;
        for mixed in &self.upper {
            x = mixed.forward(&x)?;
        }
        Ok(Features {
            pool: x.f_mean_dim([2i64, 3].as_slice(), false, Kind::Float)?,
            spatial: spatial.f_permute([0, 2, 3, 1])?.f_reshape([-1, SPATIAL_FEATURES])?,
        })
    }

    /// The classifier's probabilities without its bias, as the evaluators' Inception Score takes them; natural logarithm.
    ///
    /// # Shapes
    /// `pool`: `[N, 2048]` → f64 `[N, 1008]`.
    ///
    /// # Errors
    /// A refusal by libtorch.
    pub fn log_probabilities(&self, pool: &Tensor) -> Result<Tensor, MetricsError> {
        let logits = pool.f_to_device(self.device)?.f_linear(&self.classifier, None::<&Tensor>)?;
        Ok(logits.f_to_device(Device::Cpu)?.f_log_softmax(1, Kind::Double)?)
    }
}

/// 3 × 3, stride 2.
fn max_pool(x: &Tensor) -> Result<Tensor, MetricsError> {
    Ok(x.f_max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false)?)
}
