//! WebDataset shards: tar files in which the members of one sample share a name up to the first dot.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::source::{IMAGE_EXTENSIONS, ImageSource, Sample, SourceError, decode, digest_of};

/// Samples of several tar files, in the order of the sorted shard names; images are read by offset.
pub(super) struct WebDatasetSource {
    shards: Vec<PathBuf>,
    samples: Vec<Entry>,
    classes: usize,
    digest: String,
}

struct Entry {
    shard: usize,
    key: String,
    label: i64,
    offset_bytes: u64,
    size_bytes: u64,
}

/// What has been seen of the sample being read.
#[derive(Default)]
struct Pending {
    key: String,
    label: Option<i64>,
    image: Option<(u64, u64)>,
}

impl WebDatasetSource {
    /// Opens every file that `pattern` matches: `*`, `?`, `[…]`, and ranges `{0000..0127}`.
    pub(super) fn open(pattern: &str) -> Result<Self, SourceError> {
        let shards = expand(pattern)?;
        let mut samples = Vec::new();
        for (number, path) in shards.iter().enumerate() {
            index(path, number, &mut samples)?;
        }
        let classes = samples.iter().map(|s| s.label as usize + 1).max().unwrap_or(0);
        let lines: Vec<String> = samples
            .iter()
            .map(|s| format!("{} {} {} {}", file_name(&shards[s.shard]), s.key, s.label, s.size_bytes))
            .collect();
        let digest = digest_of(lines.iter().map(|line| line.as_bytes()));
        Ok(Self { shards, samples, classes, digest })
    }
}

impl ImageSource for WebDatasetSource {
    fn count(&self) -> usize {
        self.samples.len()
    }

    fn num_classes(&self) -> usize {
        self.classes
    }

    fn digest(&self) -> &str {
        &self.digest
    }

    fn get(&self, index: usize) -> Result<Sample, SourceError> {
        let entry = &self.samples[index];
        let shard = &self.shards[entry.shard];
        let name = format!("{} ({})", shard.display(), entry.key);
        let mut bytes = vec![0; entry.size_bytes as usize];
        File::open(shard)
            .and_then(|mut file| {
                file.seek(SeekFrom::Start(entry.offset_bytes))?;
                file.read_exact(&mut bytes)
            })
            .map_err(|e| SourceError::Image { name: name.clone(), reason: format!("cannot read it: {e}") })?;
        let id = format!("{}/{}", file_name(shard), entry.key);
        Ok(Sample { id, label: entry.label, picture: decode(&name, &bytes)? })
    }
}

/// Reads the headers (and the small label members) of one shard.
fn index(path: &Path, shard: usize, samples: &mut Vec<Entry>) -> Result<(), SourceError> {
    let broken = |e: std::io::Error| {
        SourceError::open(path, format!("not a complete tar file: {e}; compressed shards must be unpacked first"))
    };
    let file = File::open(path).map_err(|e| SourceError::open(path, format!("cannot read it: {e}")))?;
    let length_bytes = file.metadata().map_err(broken)?.len();
    let mut archive = tar::Archive::new(file);
    let mut pending = Pending::default();
    let before = samples.len();
    for entry in archive.entries_with_seek().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let member = entry.path().map_err(broken)?.to_string_lossy().into_owned();
        let (offset_bytes, size_bytes) = (entry.raw_file_position(), entry.size());
        // Seeking past the end succeeds, so a shard cut inside a member must be noticed here.
        if offset_bytes.saturating_add(size_bytes) > length_bytes {
            let reason = format!(
                "ends at byte {length_bytes} inside {member} ({size_bytes} bytes at {offset_bytes}); copy it again"
            );
            return Err(SourceError::open(path, reason));
        }
        let Some((key, ending)) = split_member(&member).filter(|_| entry.header().entry_type().is_file()) else {
            continue;
        };
        if key != pending.key {
            finish(path, shard, std::mem::take(&mut pending), samples)?;
            pending.key = key.to_string();
        }
        match ending.as_str() {
            "cls" | "json" => {
                let mut text = String::new();
                entry.read_to_string(&mut text).map_err(broken)?;
                let label = parse_label(&ending, &text);
                if ending == "cls" || label.is_some() {
                    pending.label = label.or(pending.label);
                }
                if ending == "cls" && label.is_none() {
                    let reason = format!("{member} contains {:?}, expected a class number from 0", text.trim());
                    return Err(SourceError::open(path, reason));
                }
            }
            image if !IMAGE_EXTENSIONS.contains(&image) => {}
            _ if pending.image.is_some() => {
                return Err(SourceError::open(path, format!("the sample {key:?} has several images, expected one")));
            }
            _ => pending.image = Some((offset_bytes, size_bytes)),
        }
    }
    finish(path, shard, pending, samples)?;
    if samples.len() == before {
        return Err(SourceError::open(path, "holds no samples; expected members like 000017.jpg and 000017.cls"));
    }
    Ok(())
}

/// Turns the members seen under one key into a sample.
fn finish(path: &Path, shard: usize, pending: Pending, samples: &mut Vec<Entry>) -> Result<(), SourceError> {
    let Pending { key, label, image } = pending;
    let missing = match (image, label) {
        // A key without image and label is not a sample (a README, say).
        (None, None) => return Ok(()),
        (Some((offset_bytes, size_bytes)), Some(label)) => {
            samples.push(Entry { shard, key, label, offset_bytes, size_bytes });
            return Ok(());
        }
        (None, Some(_)) => "no image (jpg, jpeg, png, webp)",
        (Some(_), None) => "no label (a .cls member, or a .json member with \"label\")",
    };
    Err(SourceError::open(path, format!("the sample {key:?} has {missing}")))
}

/// A member's key (with its folder) and its ending in lower case: `a/b.seg.png` is `a/b` and `seg.png`.
fn split_member(member: &str) -> Option<(&str, String)> {
    let start = member.rfind('/').map_or(0, |slash| slash + 1);
    let dot = start + member[start..].find('.')?;
    // Hidden files (`.DS_Store`, `._000017.jpg`) are not samples.
    (dot > start).then(|| (&member[..dot], member[dot + 1..].to_lowercase()))
}

fn parse_label(ending: &str, text: &str) -> Option<i64> {
    let label = match ending {
        "cls" => text.trim().parse().ok(),
        _ => serde_json::from_str::<serde_json::Value>(text).ok()?.get("label")?.as_i64(),
    };
    label.filter(|label| (0..i64::from(i32::MAX)).contains(label))
}

fn file_name(path: &Path) -> std::borrow::Cow<'_, str> {
    path.file_name().unwrap_or_default().to_string_lossy()
}

/// All files that the pattern matches, sorted, at least one.
fn expand(pattern: &str) -> Result<Vec<PathBuf>, SourceError> {
    let refuse = |reason: String| SourceError::Spec { found: format!("tar:{pattern}"), reason };
    let mut paths = Vec::new();
    for one in expand_ranges(pattern).map_err(refuse)? {
        let before = paths.len();
        for path in glob::glob(&one).map_err(|e| refuse(e.to_string()))? {
            paths.push(path.map_err(|e| SourceError::open(e.path(), e.error()))?);
        }
        if paths.len() == before {
            return Err(SourceError::open(Path::new(&one), "no such file, or nothing matches"));
        }
    }
    paths.sort();
    paths.dedup();
    Ok(paths)
}

/// Writes out the ranges `{0..9}`; the numbers keep the width of the first one.
fn expand_ranges(pattern: &str) -> Result<Vec<String>, String> {
    let Some((head, rest)) = pattern.split_once('{') else { return Ok(vec![pattern.to_string()]) };
    let parsed = rest.split_once('}').and_then(|(range, tail)| {
        let (from, to) = range.split_once("..")?;
        Some((from.len(), from.parse::<u32>().ok()?, to.parse::<u32>().ok()?, tail))
    });
    let Some((digits, from, to, tail)) = parsed.filter(|(_, from, to, _)| from <= to && to - from < 1_000_000) else {
        return Err(format!("the braces in {pattern:?} are not a range like {{0000..0127}}"));
    };
    let tails = expand_ranges(tail)?;
    Ok((from..=to).flat_map(|n| tails.iter().map(move |t| format!("{head}{n:0digits$}{t}"))).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn png(value: u8) -> Vec<u8> {
        let mut bytes = std::io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(1, 1, image::Rgb([value; 3]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    fn shard(path: &Path, members: &[(&str, Vec<u8>)]) {
        let mut tar = tar::Builder::new(File::create(path).unwrap());
        for (name, bytes) in members {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, bytes.as_slice()).unwrap();
        }
        tar.finish().unwrap();
    }

    #[test]
    fn members_are_grouped_by_key_and_read_from_their_shard() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{}/x", "long".repeat(40));
        shard(
            &dir.path().join("s-01.tar"),
            &[("b.cls", b"7\n".to_vec()), ("b.png", png(3)), ("README.md", b"no sample".to_vec())],
        );
        shard(
            &dir.path().join("s-00.tar"),
            &[
                ("d.1/a.PNG", png(1)),
                ("d.1/a.json", br#"{"label": 2, "caption": "a dot"}"#.to_vec()),
                ("d.1/a.mask.png", b"ignored".to_vec()),
                (&format!("{long}.jpg"), png(2)),
                (&format!("{long}.cls"), b"0".to_vec()),
            ],
        );
        let pattern = dir.path().join("s-*.tar").display().to_string();
        let source = WebDatasetSource::open(&pattern).unwrap();
        assert_eq!((source.count(), source.num_classes()), (3, 8));
        let read: Vec<(String, i64, u8)> =
            (0..3).map(|i| source.get(i).map(|s| (s.id, s.label, s.picture.pixels[0])).unwrap()).collect();
        let expected =
            [("s-00.tar/d.1/a".into(), 2, 1), (format!("s-00.tar/{long}"), 0, 2), ("s-01.tar/b".into(), 7, 3)];
        assert_eq!(read, expected);
        let ranged = WebDatasetSource::open(&dir.path().join("s-{00..01}.tar").display().to_string()).unwrap();
        assert_eq!(ranged.digest(), source.digest());
        let missing = WebDatasetSource::open(&dir.path().join("s-{00..02}.tar").display().to_string()).err().unwrap();
        assert!(missing.to_string().contains("s-02.tar"), "{missing}");
    }

    #[test]
    fn incomplete_samples_and_shards_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.tar");
        let message = || WebDatasetSource::open(&path.display().to_string()).err().unwrap().to_string();
        shard(&path, &[("a.png", png(1))]);
        assert!(message().contains("\"a\" has no label"), "{}", message());
        shard(&path, &[("a.cls", b"1".to_vec())]);
        assert!(message().contains("\"a\" has no image"), "{}", message());
        shard(&path, &[("a.cls", b"cat".to_vec())]);
        assert!(message().contains("a.cls contains \"cat\""), "{}", message());
        shard(&path, &[("a.cls", b"1".to_vec()), ("a.png", png(1)), ("a.jpg", png(2))]);
        assert!(message().contains("\"a\" has several images"), "{}", message());
        shard(&path, &[("notes.txt", b"1".to_vec())]);
        assert!(message().contains("holds no samples"), "{}", message());
        shard(&path, &[("a.cls", b"1".to_vec()), ("a.jpg", vec![0; 4000])]);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..3000]).unwrap();
        assert!(message().contains("ends at byte 3000 inside a.jpg"), "{}", message());
    }

    #[test]
    fn an_undecodable_image_is_the_error_of_that_image() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.tar");
        shard(&path, &[("a.cls", b"1".to_vec()), ("a.jpg", vec![7; 40])]);
        let error = WebDatasetSource::open(&path.display().to_string()).unwrap().get(0).unwrap_err();
        assert!(matches!(error, SourceError::Image { .. }) && error.to_string().contains("s.tar (a)"), "{error}");
    }
}
