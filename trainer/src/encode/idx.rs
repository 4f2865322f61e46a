//! The idx files of MNIST and its successors (Fashion-MNIST, KMNIST …).

use std::io::Read;
use std::path::{Path, PathBuf};

use super::source::{ImageSource, Sample, SourceError, digest_of};
use crate::images::Picture;

const IMAGES_MAGIC: u32 = 0x0803;
const LABELS_MAGIC: u32 = 0x0801;

/// Gray images held in memory.
pub(super) struct IdxSource {
    split: &'static str,
    rows: usize,
    columns: usize,
    pixels: Vec<u8>,
    labels: Vec<u8>,
    digest: String,
}

impl IdxSource {
    /// Opens `DIR`, `DIR:train` or `DIR:test`, a folder with `{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]`.
    pub(super) fn open(text: &str) -> Result<Self, SourceError> {
        let (dir, split, prefix) = match text.rsplit_once(':') {
            Some((dir, "train")) => (dir, "train", "train"),
            Some((dir, "test")) => (dir, "test", "t10k"),
            _ => (text, "train", "train"),
        };
        let images_path = find(Path::new(dir), &format!("{prefix}-images-idx3-ubyte"))?;
        let labels_path = find(Path::new(dir), &format!("{prefix}-labels-idx1-ubyte"))?;
        let (images, labels) = (read(&images_path)?, read(&labels_path)?);
        let [count, rows, columns] = header(&images_path, &images, IMAGES_MAGIC)?;
        let [label_count] = header(&labels_path, &labels, LABELS_MAGIC)?;
        if count != label_count || count == 0 || rows == 0 || columns == 0 {
            let reason = format!(
                "{label_count} labels for {count} images of {rows} x {columns} in {}, expected one each",
                images_path.display()
            );
            return Err(SourceError::open(&labels_path, reason));
        }
        Ok(Self {
            split,
            rows,
            columns,
            digest: digest_of([images.as_slice(), labels.as_slice()]),
            pixels: images[16..].to_vec(),
            labels: labels[8..].to_vec(),
        })
    }
}

impl ImageSource for IdxSource {
    fn count(&self) -> usize {
        self.labels.len()
    }

    fn num_classes(&self) -> usize {
        self.labels.iter().max().map_or(0, |&label| label as usize + 1)
    }

    fn digest(&self) -> &str {
        &self.digest
    }

    fn get(&self, index: usize) -> Result<Sample, SourceError> {
        let size = self.rows * self.columns;
        let pixels = self.pixels[index * size..][..size].to_vec();
        Ok(Sample {
            id: format!("{}/{index:05}", self.split),
            label: self.labels[index] as i64,
            picture: Picture { width: self.columns, height: self.rows, channels: 1, pixels },
        })
    }
}

/// The plain or gzipped file `name` in `dir`.
fn find(dir: &Path, name: &str) -> Result<PathBuf, SourceError> {
    let candidates = [dir.join(format!("{name}.gz")), dir.join(name)];
    candidates.into_iter().find(|path| path.is_file()).ok_or_else(|| {
        SourceError::open(
            dir,
            format!("found neither {name}.gz nor {name}; expected the four idx files of the data set"),
        )
    })
}

fn read(path: &Path) -> Result<Vec<u8>, SourceError> {
    let bytes = std::fs::read(path).map_err(|e| SourceError::open(path, format!("cannot read it: {e}")))?;
    if path.extension().is_none_or(|ending| ending != "gz") {
        return Ok(bytes);
    }
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(bytes.as_slice())
        .read_to_end(&mut plain)
        .map_err(|e| SourceError::open(path, format!("damaged gzip data: {e}; copy or download it again")))?;
    Ok(plain)
}

/// Checks magic number and length; returns the dimensions.
fn header<const N: usize>(path: &Path, bytes: &[u8], magic: u32) -> Result<[usize; N], SourceError> {
    let word = |i: usize| bytes.get(4 * i..4 * i + 4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    if word(0) != Some(magic) {
        let found = word(0).map_or("nothing".into(), |m| format!("{m:#010x}"));
        return Err(SourceError::open(
            path,
            format!("starts with {found}, expected the idx magic number {magic:#010x}"),
        ));
    }
    let mut dims = [0; N];
    for (i, dim) in dims.iter_mut().enumerate() {
        *dim = word(i + 1).ok_or_else(|| SourceError::open(path, "ends inside its header"))? as usize;
    }
    let expected = dims.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).and_then(|n| n.checked_add(4 + 4 * N));
    if expected != Some(bytes.len()) {
        let reason = format!("{} bytes unpacked, expected {expected:?} for dimensions {dims:?}", bytes.len());
        return Err(SourceError::open(path, reason));
    }
    Ok(dims)
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    /// Writes `count` images of 4×4 whose pixels are `10·index + position`, labels `index % 3`; gzipped.
    pub fn write_idx(dir: &Path, count: usize) {
        let words = |words: &[u32]| words.iter().flat_map(|w| w.to_be_bytes()).collect::<Vec<u8>>();
        let mut images = words(&[IMAGES_MAGIC, count as u32, 4, 4]);
        images.extend((0..count).flat_map(|i| (0..16).map(move |p| (10 * i + p) as u8)));
        let mut labels = words(&[LABELS_MAGIC, count as u32]);
        labels.extend((0..count).map(|i| (i % 3) as u8));
        for (name, bytes) in [("train-images-idx3-ubyte.gz", images), ("train-labels-idx1-ubyte.gz", labels)] {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(&bytes).unwrap();
            std::fs::write(dir.join(name), gz.finish().unwrap()).unwrap();
        }
    }

    #[test]
    fn images_and_labels_stay_together() {
        let dir = tempfile::tempdir().unwrap();
        write_idx(dir.path(), 5);
        let source = IdxSource::open(&format!("{}:train", dir.path().display())).unwrap();
        assert_eq!((source.count(), source.num_classes()), (5, 3));
        let sample = source.get(4).unwrap();
        assert_eq!((sample.id.as_str(), sample.label), ("train/00004", 1));
        assert_eq!(sample.picture.pixels, (40..56).collect::<Vec<u8>>());
    }

    #[test]
    fn damaged_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = dir.path().display().to_string();
        let message = || IdxSource::open(&text).err().unwrap().to_string();
        assert!(message().contains("train-images-idx3-ubyte"), "{}", message());
        write_idx(dir.path(), 5);
        let images = dir.path().join("train-images-idx3-ubyte.gz");
        let bytes = std::fs::read(&images).unwrap();
        std::fs::write(&images, &bytes[..bytes.len() / 2]).unwrap();
        assert!(message().contains("train-images-idx3-ubyte.gz: damaged gzip data"), "{}", message());
        // Swapped files: the magic number tells.
        std::fs::copy(dir.path().join("train-labels-idx1-ubyte.gz"), &images).unwrap();
        assert!(message().contains("expected the idx magic number 0x00000803"), "{}", message());
    }
}
