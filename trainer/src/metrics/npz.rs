//! Arrays of `.npz` files, read bit by bit.

use super::MetricsError;
use flate2::read::DeflateDecoder;
use npyz::zip::{CompressionMethod, ZipArchive};
use npyz::{NpyHeader, Order};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom, Take};
use std::path::{Path, PathBuf};

/// An open `.npz` file.
pub struct NpzFile {
    path: PathBuf,
    zip: ZipArchive<BufReader<File>>,
}

/// One array, from its first value on.
pub struct NpzArray {
    path: PathBuf,
    name: String,
    shape: Vec<usize>,
    dtype: String,
    reader: Member,
}

/// The bytes of a member of the zip file.
enum Member {
    /// As they are; skipped without reading.
    Stored(Take<File>),
    Deflated(DeflateDecoder<Take<File>>),
}

impl NpzFile {
    /// Opens the file and reads its directory.
    ///
    /// # Errors
    /// Not a readable zip file.
    pub fn open(path: &Path) -> Result<Self, MetricsError> {
        let file = File::open(path).map_err(|e| MetricsError::file(path, format!("cannot read it: {e}")))?;
        let zip = ZipArchive::new(BufReader::new(file)).map_err(|e| {
            MetricsError::file(path, format!("not a readable .npz file ({e}); was it copied or downloaded whole?"))
        })?;
        Ok(Self { path: path.into(), zip })
    }

    /// The names of the arrays.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.zip.file_names().filter_map(npyz::npz::array_name_from_file_name).map(str::to_owned).collect();
        names.sort();
        names
    }

    /// Whether there is an array of this name.
    pub fn has(&self, name: &str) -> bool {
        self.names().iter().any(|found| found == name)
    }

    /// The array `name`, positioned at its first value.
    ///
    /// # Errors
    /// No such array, a damaged one, one that is compressed otherwise than by deflate, or one of Python objects.
    pub fn array(&mut self, name: &str) -> Result<NpzArray, MetricsError> {
        let path = self.path.clone();
        let fail = |reason: String| MetricsError::file(&path, format!("array `{name}`: {reason}"));
        if !self.has(name) {
            return Err(fail(format!("not in the file, which has {}", self.names().join(", "))));
        }
        let member = self.zip.by_name(&npyz::npz::file_name_from_array_name(name)).map_err(|e| fail(e.to_string()))?;
        let (start, compressed, whole) = (member.data_start(), member.compressed_size(), member.size());
        let method = member.compression();
        drop(member);
        let mut file = File::open(&path).map_err(|e| fail(e.to_string()))?;
        file.seek(SeekFrom::Start(start)).map_err(|e| fail(e.to_string()))?;
        let mut reader = match method {
            CompressionMethod::Stored => Member::Stored(file.take(compressed)),
            CompressionMethod::Deflated => Member::Deflated(DeflateDecoder::new(file.take(compressed))),
            other => return Err(fail(format!("compressed by {other}; expected numpy's savez or savez_compressed"))),
        };
        let mut counted = Counted { reader: &mut reader, bytes: 0 };
        let header = NpyHeader::from_reader(&mut counted).map_err(|e| fail(format!("no numpy header: {e}")))?;
        let header_bytes = counted.bytes;
        if header.uses_pickled_array() {
            return Err(fail("holds Python objects, expected numbers".into()));
        }
        if header.order() == Order::Fortran && header.shape().len() > 1 {
            return Err(fail("in Fortran order, expected C order; save numpy.ascontiguousarray of it".into()));
        }
        let sides: Option<Vec<usize>> = header.shape().iter().map(|&side| side.try_into().ok()).collect();
        let bytes = sides.as_ref().and_then(|sides| {
            let item = header.dtype().num_bytes()?;
            sides.iter().try_fold(item, |product, &side| product.checked_mul(side))
        });
        match (sides, bytes) {
            (Some(shape), Some(bytes)) if header_bytes.checked_add(bytes as u64) == Some(whole) => {
                let dtype = header.dtype().descr().trim_matches('\'').to_owned();
                Ok(NpzArray { path, name: name.to_owned(), shape, dtype, reader })
            }
            _ => Err(fail(format!(
                "shape {:?} of {}, but {} bytes follow the header; the file is damaged",
                header.shape(),
                header.dtype().descr(),
                whole.saturating_sub(header_bytes)
            ))),
        }
    }
}

impl NpzArray {
    /// Its shape.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its element type as numpy writes it, for example `|u1` or `<f8`.
    pub fn dtype(&self) -> &str {
        &self.dtype
    }

    /// An error about this array.
    pub fn refuse(&self, reason: impl std::fmt::Display) -> MetricsError {
        MetricsError::file(&self.path, format!("array `{}`: {reason}", self.name))
    }

    /// Passes over the next `bytes` bytes.
    ///
    /// # Errors
    /// The array ends before, or cannot be read.
    pub fn skip(&mut self, bytes: u64) -> Result<(), MetricsError> {
        let skipped = match &mut self.reader {
            Member::Stored(reader) if reader.limit() >= bytes => {
                let left = reader.limit() - bytes;
                let moved = i64::try_from(bytes).map_err(std::io::Error::other);
                moved.and_then(|bytes| reader.get_mut().seek(SeekFrom::Current(bytes))).map(|_| {
                    reader.set_limit(left);
                    bytes
                })
            }
            other => std::io::copy(&mut other.take(bytes), &mut std::io::sink()),
        };
        match skipped {
            Ok(found) if found == bytes => Ok(()),
            Ok(found) => Err(self.refuse(format!("ends {} bytes too early; the file is damaged", bytes - found))),
            Err(error) => Err(self.refuse(format!("cannot read it: {error}"))),
        }
    }

    /// The next `bytes` bytes.
    ///
    /// # Errors
    /// The array ends before, or cannot be read.
    pub fn read(&mut self, bytes: usize) -> Result<Vec<u8>, MetricsError> {
        // Grows with what is there: a header can promise any number.
        let mut found = Vec::new();
        match (&mut self.reader).take(bytes as u64).read_to_end(&mut found) {
            Ok(_) if found.len() == bytes => Ok(found),
            Ok(_) => Err(self.refuse(format!("ends {} bytes too early; the file is damaged", bytes - found.len()))),
            Err(error) => Err(self.refuse(format!("cannot read it: {error}"))),
        }
    }

    /// The whole array of `<f4` or `<f8` as f64.
    ///
    /// # Errors
    /// Another shape or element type, or a damaged file.
    pub fn into_f64(mut self, shape: &[usize]) -> Result<Vec<f64>, MetricsError> {
        if self.shape != shape {
            return Err(self.refuse(format!("shape {:?}, expected {shape:?}", self.shape)));
        }
        let count: usize = shape.iter().product();
        match self.dtype.as_str() {
            "<f4" => {
                let bytes = self.read(count * 4)?;
                Ok(bytes.as_chunks().0.iter().map(|value| f64::from(f32::from_le_bytes(*value))).collect())
            }
            "<f8" => {
                let bytes = self.read(count * 8)?;
                Ok(bytes.as_chunks().0.iter().map(|value| f64::from_le_bytes(*value)).collect())
            }
            other => Err(self.refuse(format!("element type {other}, expected <f4 or <f8"))),
        }
    }
}

impl Read for Member {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Stored(reader) => reader.read(buffer),
            Self::Deflated(reader) => reader.read(buffer),
        }
    }
}

/// Counts what passes.
struct Counted<'a> {
    reader: &'a mut Member,
    bytes: u64,
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.reader.read(buffer)?;
        self.bytes += read as u64;
        Ok(read)
    }
}
