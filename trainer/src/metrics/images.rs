//! Pictures to be judged: a `.npz` of samples, a folder, or a source that `trainer encode` reads.

use super::MetricsError;
use super::npz::{NpzArray, NpzFile};
use crate::encode::{ImageSource, open_source, open_unlabelled};
use crate::images::Picture;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tch::Tensor;

/// How pictures of other sizes are brought to one size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fit {
    /// Side of the squares that are judged; `None`: pictures are taken as they are and must all be of one size.
    pub image_size: Option<usize>,
    /// Put smaller pictures into the middle of a black square instead of resizing and cropping them.
    pub pad: bool,
}

/// An ordered set of pictures.
pub struct ImageSet {
    kind: Kind,
    spec: String,
    fit: Fit,
}

enum Kind {
    Npz { path: PathBuf, count: usize, size: (usize, usize) },
    Source(Box<dyn ImageSource>),
}

/// The array of the pictures, as the field's evaluators name it.
const PICTURES: &str = "arr_0";

impl ImageSet {
    /// Opens `FILE.npz` (array `arr_0`, uint8 `[N, H, W, 3]`), a folder (every picture in it, however deep), or
    /// `idx:DIR[:train|test]`, `folder:DIR`, `tar:GLOB`.
    ///
    /// # Errors
    /// None of these, or what the source finds wrong.
    pub fn open(spec: &str, fit: Fit) -> Result<Self, MetricsError> {
        let path = Path::new(spec);
        let kind = if path.is_dir() {
            Kind::Source(open_unlabelled(path)?)
        } else if is_npz(path) {
            let array = NpzFile::open(path)?.array(PICTURES)?;
            let &[count, height, width, 3] = array.shape() else {
                return Err(array.refuse(format!("shape {:?}, expected [N, height, width, 3]", array.shape())));
            };
            if array.dtype() != "|u1" || count * height * width == 0 {
                let found = format!("{count} pictures of {height} × {width}, element type {}", array.dtype());
                return Err(array.refuse(format!("{found}; expected at least one picture of |u1 (uint8)")));
            }
            if fit != Fit::default() {
                return Err(
                    array.refuse("the pictures of an .npz are taken as they are; leave out --image-size and --pad")
                );
            }
            Kind::Npz { path: path.into(), count, size: (height, width) }
        } else if spec.contains(':') {
            Kind::Source(open_source(spec)?)
        } else {
            let reason = "no such folder and no .npz file; expected FILE.npz, DIR, or idx:, folder:, tar: with a path";
            return Err(MetricsError::file(path, reason));
        };
        Ok(Self { kind, spec: spec.to_owned(), fit })
    }

    /// How many pictures.
    pub fn count(&self) -> usize {
        match &self.kind {
            Kind::Npz { count, .. } => *count,
            Kind::Source(source) => source.count(),
        }
    }

    /// What it was opened with.
    pub fn spec(&self) -> &str {
        &self.spec
    }

    /// A reader at the first picture.
    ///
    /// # Errors
    /// A file that has gone away.
    pub fn reader(&self) -> Result<ImageReader<'_>, MetricsError> {
        let of_npz = match &self.kind {
            Kind::Npz { path, .. } => Some((NpzFile::open(path)?.array(PICTURES)?, 0)),
            Kind::Source(_) => None,
        };
        Ok(ImageReader { set: self, of_npz, size: None })
    }
}

pub(super) fn is_npz(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("npz")) && path.is_file()
}

/// Reads an [`ImageSet`] from front to back.
pub struct ImageReader<'a> {
    set: &'a ImageSet,
    /// The array and the number of its next picture.
    of_npz: Option<(NpzArray, usize)>,
    /// Rows and columns of the pictures so far.
    size: Option<(usize, usize)>,
}

impl ImageReader<'_> {
    /// Pictures number `range`, which begins at or after the end of the last one.
    ///
    /// # Shapes
    /// uint8 `[N, 3, H, W]` on the CPU.
    ///
    /// # Errors
    /// An unreadable picture, or one of another size than those before.
    pub fn read(&mut self, range: Range<usize>) -> Result<Tensor, MetricsError> {
        let (count, pixels) = (
            range.len(),
            match (&self.set.kind, &mut self.of_npz) {
                (Kind::Npz { size, .. }, Some((array, next))) => {
                    let bytes = size.0 * size.1 * 3;
                    array.skip((range.start.saturating_sub(*next) * bytes) as u64)?;
                    *next = range.end;
                    self.size = Some(*size);
                    array.read(range.len() * bytes)?
                }
                (Kind::Source(source), _) => {
                    let mut pixels = Vec::new();
                    for index in range {
                        let picture = fitted(source.get(index)?.picture, self.set.fit)?;
                        let (found, first) = (
                            (picture.height, picture.width),
                            *self.size.get_or_insert((picture.height, picture.width)),
                        );
                        if found != first {
                            let reason = format!(
                                "picture {index} is {} × {}, those before are {} × {}; give --image-size to crop all to one size",
                                found.1, found.0, first.1, first.0
                            );
                            return Err(MetricsError::file(Path::new(&self.set.spec), reason));
                        }
                        pixels.extend(picture.pixels);
                    }
                    pixels
                }
                (Kind::Npz { path, .. }, None) => return Err(MetricsError::file(path, "the reader has no array")),
            },
        );
        let (height, width) = self.size.unwrap_or((0, 0));
        let shape = [count, height, width, 3].map(|side| side as i64);
        Ok(Tensor::f_from_slice(&pixels)?.f_view(shape)?.f_permute([0, 3, 1, 2])?)
    }
}

fn fitted(picture: Picture, fit: Fit) -> Result<Picture, MetricsError> {
    let picture = match fit.image_size {
        None => picture,
        Some(size) if fit.pad => picture.pad(size)?,
        Some(size) => picture.centre_crop(size)?,
    };
    Ok(picture.into_channels(3))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::images::{ImageBatch, NpzWriter};

    fn values(pictures: &Tensor) -> Vec<u8> {
        Vec::try_from(pictures.contiguous().view(-1)).unwrap()
    }

    #[test]
    fn pictures_of_an_npz_are_read_by_range() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.npz");
        let mut npz = NpzWriter::create(&path, 5, 1, 2).unwrap();
        npz.push(&ImageBatch::new([5, 3, 1, 2], (0..30).collect()).unwrap()).unwrap();
        npz.finish(None).unwrap();
        let set = ImageSet::open(path.to_str().unwrap(), Fit::default()).unwrap();
        assert_eq!(set.count(), 5);
        let mut reader = set.reader().unwrap();
        let second = reader.read(1..3).unwrap();
        assert_eq!((second.size(), values(&second)), (vec![2, 3, 1, 2], (6..18).collect()));
        assert_eq!(values(&reader.read(4..5).unwrap()), (24..30).collect::<Vec<u8>>());
    }

    #[test]
    fn folders_are_read_in_order_and_sizes_must_agree_unless_cropped() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        let save = |name: &str, size: u32, value: u8| {
            image::GrayImage::from_pixel(size, size, image::Luma([value])).save(dir.path().join(name)).unwrap();
        };
        save("b/x.png", 2, 20);
        save("a.png", 2, 10);
        save("c.png", 4, 30);
        let open = |fit| ImageSet::open(dir.path().to_str().unwrap(), fit).unwrap();
        let set = open(Fit::default());
        assert_eq!(set.count(), 3);
        let mut reader = set.reader().unwrap();
        assert_eq!(values(&reader.read(0..2).unwrap()), [[10; 12], [20; 12]].concat());
        let error = reader.read(2..3).unwrap_err().to_string();
        assert!(error.contains("picture 2 is 4 × 4, those before are 2 × 2; give --image-size"), "{error}");
        let cropped = open(Fit { image_size: Some(2), pad: false });
        assert_eq!(values(&cropped.reader().unwrap().read(2..3).unwrap()), [30; 12]);
    }

    #[test]
    fn anything_else_is_refused() {
        let message = |spec: &str| ImageSet::open(spec, Fit::default()).err().unwrap().to_string();
        assert!(message("/nowhere/a.npz").contains("/nowhere/a.npz: no such folder and no .npz file"));
        let dir = tempfile::tempdir().unwrap();
        assert!(message(dir.path().to_str().unwrap()).contains("no image"));
    }
}
