//! Pixels of several images of one size.

use tch::{Kind, Tensor};

use super::ImageError;

/// Images of one size with 8-bit pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageBatch {
    /// How many images.
    pub count: usize,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// Rows of an image.
    pub height: usize,
    /// Columns of an image.
    pub width: usize,
    /// `[count, channels, height, width]`, row-major.
    pub pixels: Vec<u8>,
}

impl ImageBatch {
    /// Wraps pixels.
    ///
    /// # Shapes
    /// `pixels`: `[count, channels, height, width]` = `shape`.
    ///
    /// # Errors
    /// When the number of pixels is another one, or the channels are neither 1 nor 3.
    pub fn new(shape: [usize; 4], pixels: Vec<u8>) -> Result<Self, ImageError> {
        let [count, channels, height, width] = shape;
        if !matches!(channels, 1 | 3) || pixels.len() != shape.iter().product::<usize>() {
            let reason = format!("{} pixels of shape {shape:?}, expected [N, 1 or 3, H, W]", pixels.len());
            return Err(ImageError::Shape { call: "image batch", reason });
        }
        Ok(Self { count, channels, height, width, pixels })
    }

    /// Quantises decoded images as the field does: `clamp(127.5·x + 128, 0, 255)`, fraction dropped; NaN becomes 0.
    ///
    /// # Shapes
    /// `images`: `[N, 1 or 3, H, W]` in [-1, 1], any device and floating kind.
    ///
    /// # Errors
    /// Another shape.
    ///
    /// # Source
    /// `sample_ddp.py` of the official DiT.
    pub fn from_tensor(images: &Tensor) -> Result<Self, ImageError> {
        let found = images.size();
        let [count, channels, height, width] = found[..] else {
            let reason = format!("found shape {found:?}, expected [N, 1 or 3, H, W]");
            return Err(ImageError::Shape { call: "image batch", reason });
        };
        let host = images.f_to_device(tch::Device::Cpu)?.f_to_kind(Kind::Float)?.f_contiguous()?;
        let mut values = vec![0f32; host.numel()];
        let numel = values.len();
        host.f_copy_data(&mut values, numel)?;
        let pixels = values.into_iter().map(|x| (127.5 * x + 128.0).clamp(0.0, 255.0) as u8).collect();
        Self::new([count, channels, height, width].map(|n| n as usize), pixels)
    }

    /// # Shapes
    /// uint8 `[count, 3, height, width]` on the CPU; gray images fill all three channels.
    ///
    /// # Errors
    /// A refusal by libtorch.
    pub fn to_rgb_tensor(&self) -> Result<Tensor, ImageError> {
        let shape = [self.count, self.channels, self.height, self.width].map(|side| side as i64);
        Ok(Tensor::f_from_slice(&self.pixels)?.f_view(shape)?.f_expand([shape[0], 3, shape[2], shape[3]], false)?)
    }

    /// Appends the images of `other`.
    ///
    /// # Errors
    /// When they are of another size.
    pub fn append(&mut self, other: ImageBatch) -> Result<(), ImageError> {
        let [found, expected] = [&other, &*self].map(|batch| [batch.channels, batch.height, batch.width]);
        if found != expected {
            let reason = format!("images of shape {found:?} after images of shape {expected:?}");
            return Err(ImageError::Shape { call: "image batch", reason });
        }
        self.count += other.count;
        self.pixels.extend(other.pixels);
        Ok(())
    }

    /// Keeps the first `count` images.
    pub fn truncate(&mut self, count: usize) {
        self.count = self.count.min(count);
        self.pixels.truncate(self.count * self.channels * self.height * self.width);
    }

    /// Copies image `index` pixel-interleaved (`[height, width, out_channels]`) with the row stride of `out`, in pixels;
    /// a gray image fills all `out_channels`.
    pub(super) fn copy_interleaved(&self, index: usize, out: &mut [u8], out_stride: usize, out_channels: usize) {
        let plane = self.height * self.width;
        let image = &self.pixels[index * self.channels * plane..][..self.channels * plane];
        for y in 0..self.height {
            let row = &mut out[y * out_stride * out_channels..][..self.width * out_channels];
            for (x, pixel) in row.chunks_exact_mut(out_channels).enumerate() {
                for (c, value) in pixel.iter_mut().enumerate() {
                    *value = image[c.min(self.channels - 1) * plane + y * self.width + x];
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn quantisation_follows_the_field() {
        let x = Tensor::from_slice(&[-1.0f32, -0.999, 0.0, 0.999, 1.0, 2.0, -3.0, f32::NAN]).reshape([1, 1, 2, 4]);
        let batch = ImageBatch::from_tensor(&x).unwrap();
        // By hand: 127.5·x + 128 = 0.5, 0.6275, 128, 255.3725, 255.5, …
        assert_eq!(batch.pixels, [0, 0, 128, 255, 255, 255, 0, 0]);
        assert_eq!((batch.count, batch.channels, batch.height, batch.width), (1, 1, 2, 4));
        assert!(ImageBatch::from_tensor(&Tensor::zeros([1, 4, 2, 2], (Kind::Float, tch::Device::Cpu))).is_err());
    }
}
