//! Where images come from.

use std::path::{Path, PathBuf};

use super::{folder::FolderSource, idx::IdxSource, webdataset::WebDatasetSource};
use crate::images::Picture;

/// A source of labelled images that cannot be opened or read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The `--source` text is not of a known form.
    #[error("--source {found:?}: {reason}; expected idx:DIR[:train|test], folder:DIR or tar:GLOB")]
    Spec {
        /// What was given.
        found: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The source as a whole cannot be used.
    #[error("{}: {reason}", path.display())]
    Open {
        /// The file or folder.
        path: PathBuf,
        /// Found and expected.
        reason: String,
    },
    /// One image cannot be used; `--on-error skip` passes over these.
    #[error("{name}: {reason}")]
    Image {
        /// The file, or the shard and the member.
        name: String,
        /// What the decoder said.
        reason: String,
    },
}

impl SourceError {
    pub(super) fn open(path: &Path, reason: impl ToString) -> Self {
        Self::Open { path: path.into(), reason: reason.to_string() }
    }
}

/// A labelled image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Names the image in the data set; unique within a source.
    pub id: String,
    /// Class, from 0.
    pub label: i64,
    /// Its pixels, in the size found.
    pub picture: Picture,
}

/// An indexed set of labelled images. Reading is by position and from several threads at once; the order never changes.
pub trait ImageSource: Sync {
    /// Number of images.
    fn count(&self) -> usize;

    /// Number of classes; labels are below it.
    fn num_classes(&self) -> usize;

    /// Changes when the source holds other images (by names and sizes where reading every byte would be too slow).
    fn digest(&self) -> &str;

    /// Reads image `index`, which must be below [`Self::count`].
    ///
    /// # Errors
    /// [`SourceError::Image`] when this one image is unreadable.
    fn get(&self, index: usize) -> Result<Sample, SourceError>;
}

/// Opens `idx:DIR[:train|test]`, `folder:DIR` or `tar:GLOB`.
///
/// # Errors
/// Another form, or what the source finds wrong.
pub fn open(spec: &str) -> Result<Box<dyn ImageSource>, SourceError> {
    let refuse = |reason: String| SourceError::Spec { found: spec.into(), reason };
    let (kind, rest) = spec.split_once(':').ok_or_else(|| refuse("there is no colon".into()))?;
    if rest.is_empty() {
        return Err(refuse("the path is empty".into()));
    }
    match kind {
        "idx" => Ok(Box::new(IdxSource::open(rest)?)),
        "folder" => Ok(Box::new(FolderSource::open(Path::new(rest))?)),
        "tar" => Ok(Box::new(WebDatasetSource::open(rest)?)),
        other => Err(refuse(format!("the kind {other:?} is unknown"))),
    }
}

/// All images in a folder and those below it, in order of their paths, as one class.
///
/// # Errors
/// A folder that cannot be listed or holds no image.
pub fn open_unlabelled(folder: &Path) -> Result<Box<dyn ImageSource>, SourceError> {
    Ok(Box::new(FolderSource::unlabelled(folder)?))
}

/// File name endings, in lower case, that are read as images.
pub(super) const IMAGE_EXTENSIONS: [&str; 4] = ["jpg", "jpeg", "png", "webp"];

/// Decodes an image file; the format is told by its content, not its name.
pub(super) fn decode(name: &str, bytes: &[u8]) -> Result<Picture, SourceError> {
    let fail = |reason: String| SourceError::Image { name: name.into(), reason };
    let image = image::load_from_memory(bytes)
        .map_err(|e| fail(format!("not a readable image: {e} ({} bytes found)", bytes.len())))?;
    Ok(Picture::from_dynamic(image))
}

/// SHA-256 in hex over `parts`, each with its length, so that no two lists agree by accident.
pub(super) fn digest_of<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    use sha2::{Digest, Sha256};
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
