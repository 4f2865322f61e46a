//! Encoder and decoder: levels of residual blocks around a middle with attention.

use tch::Tensor;

use super::layers::{Attention, Conv, Downsample, Norm, ResnetBlock, Upsample};
use super::weights::Weights;
use super::{Probe, VaeConfig, VaeError};

type Result<T> = std::result::Result<T, VaeError>;

/// Residual block, attention (if configured), residual block.
struct Middle {
    first: ResnetBlock,
    attention: Option<Attention>,
    second: ResnetBlock,
}

impl Middle {
    fn new(weights: &mut Weights, name: &str, channels: i64, config: &VaeConfig) -> Result<Self> {
        let groups = config.norm_num_groups;
        Ok(Self {
            first: ResnetBlock::new(weights, &format!("{name}.resnets.0"), channels, channels, groups)?,
            attention: match config.mid_block_add_attention {
                true => Some(Attention::new(weights, &format!("{name}.attentions.0"), channels, groups)?),
                false => None,
            },
            second: ResnetBlock::new(weights, &format!("{name}.resnets.1"), channels, channels, groups)?,
        })
    }

    fn forward(&self, x: &Tensor, side: &str, probe: Probe) -> Result<Tensor> {
        let mut h = self.first.forward(x)?;
        if let Some(attention) = &self.attention {
            h = attention.forward(&h)?;
            probe(&format!("{side}/mid_attn"), &h);
        }
        let h = self.second.forward(&h)?;
        probe(&format!("{side}/mid"), &h);
        Ok(h)
    }
}

/// One resolution: residual blocks, then a change of size except at the last level.
struct Level<Resize> {
    resnets: Vec<ResnetBlock>,
    resize: Option<Resize>,
}

impl<Resize> Level<Resize> {
    fn resnets(
        weights: &mut Weights,
        name: &str,
        from: i64,
        to: i64,
        count: usize,
        groups: i64,
    ) -> Result<Vec<ResnetBlock>> {
        (0..count)
            .map(|j| {
                let from = if j == 0 { from } else { to };
                ResnetBlock::new(weights, &format!("{name}.resnets.{j}"), from, to, groups)
            })
            .collect()
    }

    fn forward_resnets(&self, mut h: Tensor, name: &str, probe: Probe) -> Result<Tensor> {
        for (j, resnet) in self.resnets.iter().enumerate() {
            h = resnet.forward(&h)?;
            probe(&format!("{name}_resnet{j}"), &h);
        }
        Ok(h)
    }
}

/// Image to moments (before the quant convolution).
pub(super) struct Encoder {
    conv_in: Conv,
    levels: Vec<Level<Downsample>>,
    middle: Middle,
    norm_out: Norm,
    conv_out: Conv,
}

impl Encoder {
    pub(super) fn new(weights: &mut Weights, config: &VaeConfig) -> Result<Self> {
        let (channels, groups) = (&config.block_out_channels, config.norm_num_groups);
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut levels = Vec::with_capacity(channels.len());
        for (i, &to) in channels.iter().enumerate() {
            let name = format!("encoder.down_blocks.{i}");
            let from = channels[i.saturating_sub(1)];
            levels.push(Level {
                resnets: Level::<Downsample>::resnets(weights, &name, from, to, config.layers_per_block, groups)?,
                resize: match i + 1 < channels.len() {
                    true => Some(Downsample::new(weights, &format!("{name}.downsamplers.0"), to)?),
                    false => None,
                },
            });
        }
        Ok(Self {
            conv_in: Conv::new(weights, "encoder.conv_in", config.in_channels, first, 3)?,
            levels,
            middle: Middle::new(weights, "encoder.mid_block", last, config)?,
            norm_out: Norm::new(weights, "encoder.conv_norm_out", last, groups)?,
            conv_out: Conv::new(weights, "encoder.conv_out", last, 2 * config.latent_channels, 3)?,
        })
    }

    pub(super) fn forward(&self, image: &Tensor, probe: Probe) -> Result<Tensor> {
        let mut h = self.conv_in.forward(image)?;
        probe("enc/conv_in", &h);
        for (i, level) in self.levels.iter().enumerate() {
            let name = format!("enc/down{i}");
            h = level.forward_resnets(h, &name, probe)?;
            if let Some(downsample) = &level.resize {
                h = downsample.forward(&h)?;
            }
            probe(&name, &h);
        }
        let h = self.middle.forward(&h, "enc", probe)?;
        let h = self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?;
        probe("enc/conv_out", &h);
        Ok(h)
    }
}

/// Latent (after the post-quant convolution) to image.
pub(super) struct Decoder {
    conv_in: Conv,
    middle: Middle,
    levels: Vec<Level<Upsample>>,
    norm_out: Norm,
    conv_out: Conv,
}

impl Decoder {
    pub(super) fn new(weights: &mut Weights, config: &VaeConfig) -> Result<Self> {
        let groups = config.norm_num_groups;
        let channels: Vec<i64> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let mut levels = Vec::with_capacity(channels.len());
        for (i, &to) in channels.iter().enumerate() {
            let name = format!("decoder.up_blocks.{i}");
            let from = channels[i.saturating_sub(1)];
            levels.push(Level {
                resnets: Level::<Upsample>::resnets(weights, &name, from, to, config.layers_per_block + 1, groups)?,
                resize: match i + 1 < channels.len() {
                    true => Some(Upsample::new(weights, &format!("{name}.upsamplers.0"), to)?),
                    false => None,
                },
            });
        }
        Ok(Self {
            conv_in: Conv::new(weights, "decoder.conv_in", config.latent_channels, first, 3)?,
            middle: Middle::new(weights, "decoder.mid_block", first, config)?,
            levels,
            norm_out: Norm::new(weights, "decoder.conv_norm_out", last, groups)?,
            conv_out: Conv::new(weights, "decoder.conv_out", last, config.out_channels, 3)?,
        })
    }

    pub(super) fn forward(&self, latent: &Tensor, probe: Probe) -> Result<Tensor> {
        let h = self.conv_in.forward(latent)?;
        probe("dec/conv_in", &h);
        let mut h = self.middle.forward(&h, "dec", probe)?;
        for (i, level) in self.levels.iter().enumerate() {
            let name = format!("dec/up{i}");
            h = level.forward_resnets(h, &name, probe)?;
            if let Some(upsample) = &level.resize {
                h = upsample.forward(&h)?;
            }
            probe(&name, &h);
        }
        let image = self.conv_out.forward(&self.norm_out.forward_silu(&h)?)?;
        probe("dec/conv_out", &image);
        Ok(image)
    }
}
