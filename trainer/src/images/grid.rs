//! Sample grids as PNG.

use std::io::Write;
use std::path::Path;

use image::ImageEncoder;
use image::codecs::png::PngEncoder;

use super::{AtomicFile, ImageBatch, ImageError};

/// Images side by side, row by row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grid {
    /// Columns of pixels.
    pub width: usize,
    /// Rows of pixels.
    pub height: usize,
    /// 1 or 3.
    pub channels: usize,
    /// `[height, width, channels]`.
    pub pixels: Vec<u8>,
}

impl Grid {
    /// Lays the images out in rows of `columns` with `gap` black pixels between and around them; the last row may be short.
    ///
    /// # Errors
    /// When there are no images or no columns.
    pub fn new(images: &ImageBatch, columns: usize, gap: usize) -> Result<Self, ImageError> {
        if images.count == 0 || columns == 0 {
            let reason = format!("{} images in {columns} columns, expected at least one of each", images.count);
            return Err(ImageError::Shape { call: "grid", reason });
        }
        let columns = columns.min(images.count);
        let rows = images.count.div_ceil(columns);
        let (width, height) = (gap + columns * (images.width + gap), gap + rows * (images.height + gap));
        let channels = images.channels;
        let mut pixels = vec![0; width * height * channels];
        for index in 0..images.count {
            let x = gap + (index % columns) * (images.width + gap);
            let y = gap + (index / columns) * (images.height + gap);
            images.copy_interleaved(index, &mut pixels[(y * width + x) * channels..], width, channels);
        }
        Ok(Self { width, height, channels, pixels })
    }

    /// The grid as a PNG file in memory.
    ///
    /// # Errors
    /// When the grid is larger than PNG allows.
    pub fn to_png(&self) -> Result<Vec<u8>, ImageError> {
        let color = if self.channels == 1 { image::ExtendedColorType::L8 } else { image::ExtendedColorType::Rgb8 };
        let mut png = Vec::new();
        PngEncoder::new(&mut png)
            .write_image(&self.pixels, self.width as u32, self.height as u32, color)
            .map_err(|e| ImageError::Shape { call: "PNG", reason: e.to_string() })?;
        Ok(png)
    }

    /// Writes the PNG; readers see it complete or not at all.
    ///
    /// # Errors
    /// As [`Self::to_png`], and those of the file system.
    pub fn write(&self, path: &Path) -> Result<(), ImageError> {
        let png = self.to_png()?;
        let mut file = AtomicFile::create(path).map_err(ImageError::write(path))?;
        file.write_all(&png).and_then(|()| file.commit()).map_err(ImageError::write(path))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn images_stand_in_reading_order_with_gaps() {
        let images = ImageBatch::new([3, 1, 1, 2], vec![1, 2, 3, 4, 5, 6]).unwrap();
        let grid = Grid::new(&images, 2, 1).unwrap();
        let expected = [
            [0, 0, 0, 0, 0, 0, 0],
            [0, 1, 2, 0, 3, 4, 0],
            [0, 0, 0, 0, 0, 0, 0],
            [0, 5, 6, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!((grid.width, grid.height), (7, 5));
        assert_eq!(grid.pixels, expected.concat());
        assert!(Grid::new(&images, 0, 1).is_err());
    }

    #[test]
    fn a_png_on_disk_holds_the_same_colours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/grid.png");
        // Planes R = 10, 20; G = 30, 40; B = 50, 60.
        let images = ImageBatch::new([1, 3, 1, 2], vec![10, 20, 30, 40, 50, 60]).unwrap();
        Grid::new(&images, 1, 0).unwrap().write(&path).unwrap();
        let read = image::open(&path).unwrap();
        assert_eq!(read.color(), image::ColorType::Rgb8);
        assert_eq!(read.into_bytes(), [10, 30, 50, 20, 40, 60]);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file was left");
    }
}
