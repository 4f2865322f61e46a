//! One folder per class, as ImageNet is usually unpacked.

use std::path::{Path, PathBuf};

use super::source::{IMAGE_EXTENSIONS, ImageSource, Sample, SourceError, decode, digest_of};

/// Images below class folders; the classes are numbered by the sorted folder names, the images ordered by path.
pub(super) struct FolderSource {
    root: PathBuf,
    classes: usize,
    /// Path below the root with `/` between its parts, and class.
    files: Vec<(String, i64)>,
    digest: String,
}

impl FolderSource {
    /// Lists `root/CLASS/**/*.{jpg,jpeg,png,webp}`.
    pub(super) fn open(root: &Path) -> Result<Self, SourceError> {
        let names = sorted_entries(root)?;
        let classes: Vec<&String> = names.iter().filter(|name| root.join(name).is_dir()).collect();
        let mut files = Vec::new();
        for (label, class) in classes.iter().enumerate() {
            let before = files.len();
            collect(root, class, label as i64, &mut files)?;
            if files.len() == before {
                let reason = format!("the class folder holds no image ({})", IMAGE_EXTENSIONS.join(", "));
                return Err(SourceError::open(&root.join(class), reason));
            }
        }
        if files.is_empty() {
            let reason = format!("found {} entries but no class folder; expected DIR/CLASS/IMAGE.jpg", names.len());
            return Err(SourceError::open(root, reason));
        }
        Ok(Self::of(root, classes.len(), files))
    }

    /// Lists all images below `root`, however deep; they are one class.
    pub(super) fn unlabelled(root: &Path) -> Result<Self, SourceError> {
        let mut files = Vec::new();
        collect(root, "", 0, &mut files)?;
        if files.is_empty() {
            let reason = format!("holds no image ({})", IMAGE_EXTENSIONS.join(", "));
            return Err(SourceError::open(root, reason));
        }
        Ok(Self::of(root, 1, files))
    }

    fn of(root: &Path, classes: usize, files: Vec<(String, i64)>) -> Self {
        let digest = digest_of(files.iter().map(|(path, _)| path.as_bytes()));
        Self { root: root.into(), classes, files, digest }
    }
}

impl ImageSource for FolderSource {
    fn count(&self) -> usize {
        self.files.len()
    }

    fn num_classes(&self) -> usize {
        self.classes
    }

    fn digest(&self) -> &str {
        &self.digest
    }

    fn get(&self, index: usize) -> Result<Sample, SourceError> {
        let (id, label) = &self.files[index];
        let path = self.root.join(id);
        let name = path.display().to_string();
        let bytes = std::fs::read(&path)
            .map_err(|e| SourceError::Image { name: name.clone(), reason: format!("cannot read it: {e}") })?;
        Ok(Sample { id: id.clone(), label: *label, picture: decode(&name, &bytes)? })
    }
}

/// Appends the images below `root/below`, sorted level by level.
fn collect(root: &Path, below: &str, label: i64, files: &mut Vec<(String, i64)>) -> Result<(), SourceError> {
    let folder = root.join(below);
    for name in sorted_entries(&folder)? {
        let path = folder.join(&name);
        let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default();
        let id = if below.is_empty() { name } else { format!("{below}/{name}") };
        if path.is_dir() {
            collect(root, &id, label, files)?;
        } else if IMAGE_EXTENSIONS.contains(&ending.as_str()) {
            files.push((id, label));
        }
    }
    Ok(())
}

/// The names in a folder, sorted by their bytes, hidden ones left out.
fn sorted_entries(folder: &Path) -> Result<Vec<String>, SourceError> {
    let unreadable = |e: std::io::Error| SourceError::open(folder, format!("cannot list it: {e}"));
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let name = entry
            .map_err(unreadable)?
            .file_name()
            .into_string()
            .map_err(|name| SourceError::open(&folder.join(name), "the name is not valid UTF-8; rename it"))?;
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn classes_are_numbered_by_sorted_folder_names() {
        let dir = tempfile::tempdir().unwrap();
        let save = |path: &str, value: u8| {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            image::RgbImage::from_pixel(2, 1, image::Rgb([value; 3])).save(path).unwrap();
        };
        save("n02/b.png", 3);
        save("n02/a.PNG", 2);
        save("n01/deep/c.png", 1);
        std::fs::write(dir.path().join("n01/notes.txt"), "no image").unwrap();
        std::fs::write(dir.path().join("n02/z.jpeg"), "not a jpeg").unwrap();
        let source = FolderSource::open(dir.path()).unwrap();
        assert_eq!((source.count(), source.num_classes()), (4, 2));
        let read: Vec<(String, i64, u8)> =
            (0..3).map(|i| source.get(i).map(|s| (s.id, s.label, s.picture.pixels[0])).unwrap()).collect();
        assert_eq!(read, [("n01/deep/c.png".into(), 0, 1), ("n02/a.PNG".into(), 1, 2), ("n02/b.png".into(), 1, 3)]);
        let error = source.get(3).unwrap_err();
        assert!(matches!(error, SourceError::Image { .. }) && error.to_string().contains("n02/z.jpeg"), "{error}");
    }

    #[test]
    fn a_folder_without_classes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.png"), "").unwrap();
        let message = FolderSource::open(dir.path()).err().unwrap().to_string();
        assert!(message.contains("expected DIR/CLASS/IMAGE.jpg"), "{message}");
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        let message = FolderSource::open(dir.path()).err().unwrap().to_string();
        assert!(message.contains("empty: the class folder holds no image"), "{message}");
    }
}
