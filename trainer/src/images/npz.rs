//! Samples as `.npz`, as the field's FID evaluator reads them.

use std::io::Write;
use std::path::{Path, PathBuf};

use npyz::zip::{CompressionMethod, DateTime, ZipWriter, write::FileOptions};
use npyz::{WriterBuilder, npz};

use super::{AtomicFile, ImageBatch, ImageError};

/// Writes `arr_0`, uint8 `[N, H, W, 3]`, batch by batch (gray images fill all three channels), and optionally `arr_1`, int64
/// labels `[N]`. Nothing is kept in memory, and the same samples give the same bytes.
pub struct NpzWriter {
    path: PathBuf,
    zip: ZipWriter<AtomicFile>,
    count: usize,
    size: (usize, usize),
    written: usize,
}

impl NpzWriter {
    /// Begins a file of `count` images of `height` × `width`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn create(path: &Path, count: usize, height: usize, width: usize) -> Result<Self, ImageError> {
        let file = AtomicFile::create(path).map_err(ImageError::write(path))?;
        let mut zip = ZipWriter::new(file);
        let bytes = (count * height * width * 3) as u64;
        start_array::<u8>(&mut zip, 0, &[count as u64, height as u64, width as u64, 3], bytes)
            .map_err(ImageError::write(path))?;
        Ok(Self { path: path.into(), zip, count, size: (height, width), written: 0 })
    }

    /// Appends images.
    ///
    /// # Errors
    /// Another size, more images than announced, or an error of the file system.
    pub fn push(&mut self, images: &ImageBatch) -> Result<(), ImageError> {
        let found = (images.height, images.width);
        if found != self.size || self.written + images.count > self.count {
            return Err(self.shape(format!(
                "{} images of {found:?} after {}, expected {} of {:?} in all",
                images.count, self.written, self.count, self.size
            )));
        }
        let mut row = vec![0; images.height * images.width * 3];
        for index in 0..images.count {
            images.copy_interleaved(index, &mut row, images.width, 3);
            self.zip.write_all(&row).map_err(ImageError::write(&self.path))?;
        }
        self.written += images.count;
        Ok(())
    }

    /// Adds the labels, if any, and lets the file appear under its name.
    ///
    /// # Errors
    /// Fewer images than announced, another number of labels, or an error of the file system.
    pub fn finish(mut self, labels: Option<&[i64]>) -> Result<(), ImageError> {
        if self.written != self.count || labels.is_some_and(|l| l.len() != self.count) {
            let labels = labels.map_or("no".into(), |l| l.len().to_string());
            return Err(self.shape(format!("{} images and {labels} labels, expected {}", self.written, self.count)));
        }
        if let Some(labels) = labels {
            let bytes: Vec<u8> = labels.iter().flat_map(|label| label.to_le_bytes()).collect();
            start_array::<i64>(&mut self.zip, 1, &[labels.len() as u64], bytes.len() as u64)
                .and_then(|()| self.zip.write_all(&bytes))
                .map_err(ImageError::write(&self.path))?;
        }
        let file = self.zip.finish().map_err(|e| ImageError::write(&self.path)(e.into()))?;
        file.commit().map_err(ImageError::write(&self.path))
    }

    fn shape(&self, reason: String) -> ImageError {
        ImageError::Shape { call: "npz", reason: format!("{}: {reason}", self.path.display()) }
    }
}

/// Starts the zip member `arr_{index}.npy` and writes its npy header.
fn start_array<T: npyz::AutoSerialize>(
    zip: &mut ZipWriter<AtomicFile>,
    index: i32,
    shape: &[u64],
    bytes: u64,
) -> std::io::Result<()> {
    let options = FileOptions::default()
        .compression_method(CompressionMethod::Stored)
        .last_modified_time(DateTime::default())
        // Room for the header below the 4 GiB at which zip needs its larger records.
        .large_file(bytes >= (u32::MAX - 4096) as u64);
    zip.start_file(npz::file_name_from_index(index), options)?;
    let mut header = Vec::new();
    npyz::WriteOptions::new_header_only()
        .dtype(T::default_dtype())
        .shape(shape)
        .writer(&mut header)
        .write_header_only()?;
    zip.write_all(&header)
}
