//! The layers that encoder and decoder are made of. Each holds its tensors and maps `[B,C,H,W]` to `[B,C',H',W']` in f32.

use tch::Tensor;

use super::VaeError;
use super::weights::Weights;

type Result<T> = std::result::Result<T, VaeError>;

/// Every group norm of an AutoencoderKL, that of the attention included, uses this epsilon.
const NORM_EPS: f64 = 1e-6;

/// A square convolution with stride 1 that keeps the size.
pub(super) struct Conv {
    weight: Tensor,
    bias: Tensor,
    padding: i64,
}

impl Conv {
    pub(super) fn new(weights: &mut Weights, name: &str, from: i64, to: i64, kernel: i64) -> Result<Self> {
        Ok(Self {
            weight: weights.take(&format!("{name}.weight"), &[to, from, kernel, kernel])?,
            bias: weights.take(&format!("{name}.bias"), &[to])?,
            padding: kernel / 2,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.strided(x, 1, self.padding)
    }

    fn strided(&self, x: &Tensor, stride: i64, padding: i64) -> Result<Tensor> {
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), [stride, stride], [padding, padding], [1, 1], 1)?)
    }
}

/// Group norm with affine parameters.
pub(super) struct Norm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
}

impl Norm {
    pub(super) fn new(weights: &mut Weights, name: &str, channels: i64, groups: i64) -> Result<Self> {
        Ok(Self {
            weight: weights.take(&format!("{name}.weight"), &[channels])?,
            bias: weights.take(&format!("{name}.bias"), &[channels])?,
            groups,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), NORM_EPS, false)?)
    }

    /// Norm, then SiLU.
    pub(super) fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.forward(x)?.f_silu_()?)
    }
}

/// `x + conv2(silu(norm2(conv1(silu(norm1(x))))))`; the shortcut is a 1×1 convolution where the channels change.
pub(super) struct ResnetBlock {
    norm1: Norm,
    conv1: Conv,
    norm2: Norm,
    conv2: Conv,
    shortcut: Option<Conv>,
}

impl ResnetBlock {
    pub(super) fn new(weights: &mut Weights, name: &str, from: i64, to: i64, groups: i64) -> Result<Self> {
        Ok(Self {
            norm1: Norm::new(weights, &format!("{name}.norm1"), from, groups)?,
            conv1: Conv::new(weights, &format!("{name}.conv1"), from, to, 3)?,
            norm2: Norm::new(weights, &format!("{name}.norm2"), to, groups)?,
            conv2: Conv::new(weights, &format!("{name}.conv2"), to, to, 3)?,
            shortcut: match from == to {
                true => None,
                false => Some(Conv::new(weights, &format!("{name}.conv_shortcut"), from, to, 1)?),
            },
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let h = self.conv1.forward(&self.norm1.forward_silu(x)?)?;
        let mut h = self.conv2.forward(&self.norm2.forward_silu(&h)?)?;
        Ok(match &self.shortcut {
            Some(conv) => h.f_add_(&conv.forward(x)?)?,
            None => h.f_add_(x)?,
        })
    }
}

/// A fully connected layer on `[B, tokens, C]`.
struct Linear {
    weight: Tensor,
    bias: Tensor,
}

impl Linear {
    fn new(weights: &mut Weights, name: &str, channels: i64) -> Result<Self> {
        Ok(Self {
            weight: weights.take(&format!("{name}.weight"), &[channels, channels])?,
            bias: weights.take(&format!("{name}.bias"), &[channels])?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, Some(&self.bias))?)
    }
}

/// Single-head self-attention over the pixels, with residual.
pub(super) struct Attention {
    norm: Norm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    pub(super) fn new(weights: &mut Weights, name: &str, channels: i64, groups: i64) -> Result<Self> {
        Ok(Self {
            norm: Norm::new(weights, &format!("{name}.group_norm"), channels, groups)?,
            to_q: Linear::new(weights, &format!("{name}.to_q"), channels)?,
            to_k: Linear::new(weights, &format!("{name}.to_k"), channels)?,
            to_v: Linear::new(weights, &format!("{name}.to_v"), channels)?,
            to_out: Linear::new(weights, &format!("{name}.to_out.0"), channels)?,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, channels, height, width) = x.size4()?;
        // [B,C,H,W] -> [B,HW,C], and with one head [B,1,HW,C].
        let tokens = self.norm.forward(x)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let (q, k, v) = (self.to_q.forward(&tokens)?, self.to_k.forward(&tokens)?, self.to_v.forward(&tokens)?);
        let out = Tensor::f_scaled_dot_product_attention(
            &q.f_unsqueeze(1)?,
            &k.f_unsqueeze(1)?,
            &v.f_unsqueeze(1)?,
            None::<Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        let out = self.to_out.forward(&out.f_squeeze_dim(1)?)?;
        Ok(out.f_transpose(1, 2)?.f_reshape([batch, channels, height, width])?.f_add(x)?)
    }
}

/// Halves the size: one row and one column of zeros at the bottom and right, then a 3×3 convolution with stride 2.
pub(super) struct Downsample(Conv);

impl Downsample {
    pub(super) fn new(weights: &mut Weights, name: &str, channels: i64) -> Result<Self> {
        Ok(Self(Conv::new(weights, &format!("{name}.conv"), channels, channels, 3)?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.0.strided(&x.f_constant_pad_nd([0, 1, 0, 1])?, 2, 0)
    }
}

/// Doubles the size by repeating pixels, then a 3×3 convolution.
pub(super) struct Upsample(Conv);

impl Upsample {
    pub(super) fn new(weights: &mut Weights, name: &str, channels: i64) -> Result<Self> {
        Ok(Self(Conv::new(weights, &format!("{name}.conv"), channels, channels, 3)?))
    }

    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, _, height, width) = x.size4()?;
        self.0.forward(&x.f_upsample_nearest2d([2 * height, 2 * width], None, None)?)
    }
}
