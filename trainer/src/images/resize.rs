//! Pictures of any size to training images of one size.

use super::ImageError;
use super::resample::{self, Filter};

/// One picture with 8-bit pixels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Columns.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// 1 (gray) or 3 (RGB).
    pub channels: usize,
    /// `[height, width, channels]`, row-major.
    pub pixels: Vec<u8>,
}

impl Picture {
    /// Wraps pixels.
    ///
    /// # Shapes
    /// `pixels`: `[height, width, channels]`.
    ///
    /// # Errors
    /// When the number of pixels is another one, a side is zero, or the channels are neither 1 nor 3.
    pub fn new(width: usize, height: usize, channels: usize, pixels: Vec<u8>) -> Result<Self, ImageError> {
        if !matches!(channels, 1 | 3) || pixels.is_empty() || pixels.len() != width * height * channels {
            let reason = format!("{} bytes for {width} x {height} pixels of {channels} channels", pixels.len());
            return Err(ImageError::Shape { call: "picture", reason });
        }
        Ok(Self { width, height, channels, pixels })
    }

    /// A decoded file as gray (1) or RGB (3); an alpha channel is dropped.
    pub fn from_dynamic(image: image::DynamicImage) -> Self {
        let (width, height) = (image.width() as usize, image.height() as usize);
        if image.color().has_color() {
            Self { width, height, channels: 3, pixels: image.into_rgb8().into_raw() }
        } else {
            Self { width, height, channels: 1, pixels: image.into_luma8().into_raw() }
        }
    }

    /// The picture with `channels` channels: gray is copied into all three; colours become ITU-R 601 luma, rounded as
    /// Pillow's `convert("L")` does.
    pub fn into_channels(self, channels: usize) -> Self {
        let pixels = match (self.channels, channels) {
            (1, 3) => self.pixels.iter().flat_map(|&v| [v; 3]).collect(),
            (3, 1) => self
                .pixels
                .chunks_exact(3)
                .map(|rgb| {
                    let weighted = rgb[0] as u32 * 19595 + rgb[1] as u32 * 38470 + rgb[2] as u32 * 7471;
                    ((weighted + 0x8000) >> 16) as u8
                })
                .collect(),
            _ => return self,
        };
        Self { channels, pixels, ..self }
    }

    /// The centre square of `size`: halved with a box filter while the shorter side is at least twice `size`, brought to
    /// `size` along that side with the bicubic filter, then cropped; bit for bit what Pillow computes.
    ///
    /// # Errors
    /// When `size` is zero.
    ///
    /// # Source
    /// `center_crop_arr` of ADM (guided-diffusion), used by DiT.
    pub fn centre_crop(mut self, size: usize) -> Result<Self, ImageError> {
        if size == 0 {
            return Err(ImageError::Shape { call: "centre crop", reason: "size 0, expected 1 or more".into() });
        }
        while self.width.min(self.height) >= 2 * size {
            let (width, height) = (self.width / 2, self.height / 2);
            self = self.resize(width, height, Filter::Box);
        }
        let scale = size as f64 / self.width.min(self.height) as f64;
        let scaled = |side: usize| (side as f64 * scale).round_ties_even() as usize;
        let (width, height) = (scaled(self.width), scaled(self.height));
        let resized = self.resize(width, height, Filter::Bicubic);
        let (left, top) = ((resized.width - size) / 2, (resized.height - size) / 2);
        Ok(resized.window(left, top, size))
    }

    /// The picture in the middle of a black square of `size`.
    ///
    /// # Errors
    /// When the picture is larger.
    pub fn pad(&self, size: usize) -> Result<Self, ImageError> {
        if self.width > size || self.height > size {
            let reason =
                format!("the picture is {} x {}, larger than {size}; crop instead of padding", self.width, self.height);
            return Err(ImageError::Shape { call: "pad", reason });
        }
        let (left, top) = ((size - self.width) / 2, (size - self.height) / 2);
        let mut pixels = vec![0; size * size * self.channels];
        let row = self.width * self.channels;
        for (y, source) in self.pixels.chunks_exact(row).enumerate() {
            pixels[((top + y) * size + left) * self.channels..][..row].copy_from_slice(source);
        }
        Ok(Self { width: size, height: size, channels: self.channels, pixels })
    }

    fn window(&self, left: usize, top: usize, size: usize) -> Self {
        let row = size * self.channels;
        let pixels = (top..top + size)
            .flat_map(|y| &self.pixels[(y * self.width + left) * self.channels..][..row])
            .copied()
            .collect();
        Self { width: size, height: size, channels: self.channels, pixels }
    }

    fn resize(self, width: usize, height: usize, filter: Filter) -> Self {
        let Self { width: from_width, height: from_height, channels, mut pixels } = self;
        if width != from_width {
            pixels = resample::horizontal(&pixels, from_width, width, channels, filter);
        }
        if height != from_height {
            pixels = resample::vertical(&pixels, from_height, height, filter);
        }
        Self { width, height, channels, pixels }
    }
}
