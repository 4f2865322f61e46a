//! What an encoded data set is made of: the record of its options, its parts, and who writes which.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde::{Deserialize, Serialize};

use crate::images::AtomicFile;

/// Everything that the stored latents depend on. It is kept as `encode.json` beside the parts, so that a run that stopped can
/// go on and a folder made in another way is not mixed up with this one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recipe {
    /// Version of this file's format.
    pub format: u32,
    /// Digest of the source's contents.
    pub source_digest: String,
    /// Images in the source.
    pub rows: usize,
    /// Labels are in `0..num_classes`.
    pub num_classes: usize,
    /// SHA-256 of the VAE's weight file.
    pub vae_digest: String,
    /// The VAE's scaling factor.
    pub scaling_factor: f64,
    /// Subtracted from the stored means, so that a reader need only scale.
    pub shift_factor: f64,
    /// Shape of one latent.
    pub latent_shape: Vec<usize>,
    /// Side of the images.
    pub image_size: usize,
    /// Whether smaller images were padded instead of resized.
    pub pad: bool,
    /// Whether moments of the mirrored images are stored too.
    pub mirror: bool,
    /// `f16` or `f32`.
    pub dtype: String,
    /// Number of part files.
    pub parts: usize,
    /// Rows per row group.
    pub row_group_rows: usize,
}

/// The format that this version writes.
pub(super) const FORMAT: u32 = 1;
const FILE_NAME: &str = "encode.json";

impl Recipe {
    /// The rows of part `part`: even shares, in order, whatever the number of ranks.
    pub(super) fn part_rows(&self, part: usize) -> Range<usize> {
        let cut = |p: usize| p * self.rows / self.parts;
        cut(part)..cut(part + 1)
    }

    /// Where part `part` is stored.
    pub(super) fn part_path(&self, out: &Path, part: usize) -> PathBuf {
        out.join(format!("part-{part:05}-of-{:05}.parquet", self.parts))
    }

    /// Makes `out` the folder of this recipe, or finds that it is already.
    ///
    /// # Errors
    /// When the folder holds a data set made in another way (each difference is named) or cannot be written.
    pub(super) fn claim(&self, out: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(out).with_context(|| format!("{}: cannot create the folder", out.display()))?;
        let path = out.join(FILE_NAME);
        if !path.exists() {
            // Looked for again after the listing: another rank may have claimed the folder and finished a part meanwhile.
            if let Some(other) = any_parquet(out)?
                && !path.exists()
            {
                bail!(
                    "{}: found {other} but no {FILE_NAME}; expected an empty folder or one that `trainer encode` made; choose another --out",
                    out.display()
                );
            }
            let mut file = AtomicFile::create(&path).with_context(|| format!("{}: cannot write it", path.display()))?;
            serde_json::to_writer_pretty(&mut file, self)?;
            file.commit().with_context(|| format!("{}: cannot write it", path.display()))?;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}: cannot read it", path.display()))?;
        let found: serde_json::Value = serde_json::from_str(&text)
            .with_context(|| format!("{}: damaged; delete the folder or choose another --out", path.display()))?;
        let wanted = serde_json::to_value(self)?;
        let differences: Vec<String> = wanted
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| found.get(key.as_str()) != Some(value))
            .map(|(key, value)| {
                format!("`{key}` = {} there, {value} now", found.get(key.as_str()).unwrap_or(&serde_json::Value::Null))
            })
            .collect();
        ensure!(
            differences.is_empty(),
            "{}: this folder was made with other options: {}; choose another --out, or repeat the options it was made with",
            path.display(),
            differences.join("; ")
        );
        Ok(())
    }

    /// How many rows a part that is already there holds; `None` when there is none, `Err(reason)` when it is damaged or not
    /// of this recipe.
    pub(super) fn finished_rows(&self, path: &Path) -> Result<Option<usize>, String> {
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(format!("cannot read it: {e}")),
        };
        let reader = SerializedFileReader::new(file).map_err(|e| format!("not a complete parquet file: {e}"))?;
        let metadata = reader.metadata().file_metadata();
        let vae_digest = metadata
            .key_value_metadata()
            .and_then(|keys| keys.iter().find(|kv| kv.key == "ditharos.vae_digest"))
            .and_then(|kv| kv.value.as_deref());
        if vae_digest != Some(self.vae_digest.as_str()) {
            return Err(format!("was made with the VAE {vae_digest:?}, expected {:?}", self.vae_digest));
        }
        Ok(Some(metadata.num_rows().max(0) as usize))
    }
}

/// The name of some parquet file in the folder, if there is one.
fn any_parquet(folder: &Path) -> anyhow::Result<Option<String>> {
    let listing = || format!("{}: cannot list it", folder.display());
    for entry in std::fs::read_dir(folder).with_context(listing)? {
        let name = entry.with_context(listing)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".parquet") {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// Which of several cooperating processes this one is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub rank: usize,
    pub world_size: usize,
    pub local_rank: usize,
}

impl Share {
    /// The command line's `--rank`/`--world-size` if given, else what OpenMPI's `mpirun` sets, else one process.
    ///
    /// # Errors
    /// When only one of a pair is there, or the rank is not below the world size.
    pub(super) fn find(
        given: (Option<usize>, Option<usize>),
        env: impl Fn(&str) -> Option<String>,
    ) -> anyhow::Result<Self> {
        let number = |name: &str| -> anyhow::Result<Option<usize>> {
            env(name)
                .map(|text| text.parse().with_context(|| format!("{name} = {text:?}, expected a number")))
                .transpose()
        };
        let from_env = (number("OMPI_COMM_WORLD_RANK")?, number("OMPI_COMM_WORLD_SIZE")?);
        let local_rank = number("OMPI_COMM_WORLD_LOCAL_RANK")?;
        let (rank, world_size) = match if given == (None, None) { from_env } else { given } {
            (Some(rank), Some(world_size)) => (rank, world_size),
            (None, None) => (0, 1),
            (rank, world_size) => bail!("rank = {rank:?} and world size = {world_size:?}, expected both or neither"),
        };
        ensure!(rank < world_size, "rank = {rank}, expected a number below the world size {world_size}");
        Ok(Self { rank, world_size, local_rank: local_rank.unwrap_or(rank) })
    }

    /// The parts that this rank writes, in order.
    pub(super) fn parts(self, parts: usize) -> impl Iterator<Item = usize> + Clone {
        (self.rank..parts).step_by(self.world_size)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn parts_cover_every_row_once_evenly_and_ranks_every_part_once() {
        for (rows, parts) in [(60_000, 8), (7, 3), (5, 5), (1, 1)] {
            let recipe = Recipe { rows, parts, ..super::super::tests::recipe() };
            let ranges: Vec<Range<usize>> = (0..parts).map(|p| recipe.part_rows(p)).collect();
            assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((ranges[0].start, ranges[parts - 1].end), (0, rows));
            assert!(ranges.iter().all(|r| r.len().abs_diff(rows / parts) <= 1), "{ranges:?}");
            for world_size in 1..5 {
                let share = |rank| Share { rank, world_size, local_rank: rank };
                let mut all: Vec<usize> = (0..world_size).flat_map(|rank| share(rank).parts(parts)).collect();
                all.sort();
                assert_eq!(all, (0..parts).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_rank_comes_from_the_command_line_then_from_mpirun() {
        let mpirun = |name: &str| match name {
            "OMPI_COMM_WORLD_RANK" => Some("5".to_string()),
            "OMPI_COMM_WORLD_SIZE" => Some("8".to_string()),
            "OMPI_COMM_WORLD_LOCAL_RANK" => Some("1".to_string()),
            _ => None,
        };
        let none = |_: &str| None;
        let share = |rank, world_size, local_rank| Share { rank, world_size, local_rank };
        assert_eq!(Share::find((None, None), none).unwrap(), share(0, 1, 0));
        assert_eq!(Share::find((None, None), mpirun).unwrap(), share(5, 8, 1));
        assert_eq!(Share::find((Some(2), Some(4)), none).unwrap(), share(2, 4, 2));
        assert!(Share::find((Some(2), None), none).is_err());
        assert!(Share::find((Some(4), Some(4)), none).is_err());
        assert!(Share::find((None, None), |_| Some("x".into())).unwrap_err().to_string().contains("\"x\""));
    }

    #[test]
    fn a_folder_made_in_another_way_is_refused_with_every_difference() {
        let dir = tempfile::tempdir().unwrap();
        let recipe = super::super::tests::recipe();
        recipe.claim(dir.path()).unwrap();
        recipe.claim(dir.path()).unwrap();
        let other = Recipe { image_size: 64, mirror: true, ..recipe.clone() };
        let message = other.claim(dir.path()).unwrap_err().to_string();
        for part in ["encode.json", "`image_size` = 32 there, 64 now", "`mirror` = false there, true now"] {
            assert!(message.contains(part), "{message}");
        }
        let foreign = tempfile::tempdir().unwrap();
        std::fs::write(foreign.path().join("x.parquet"), "").unwrap();
        assert!(recipe.claim(foreign.path()).unwrap_err().to_string().contains("x.parquet"));
        assert!(!foreign.path().join(FILE_NAME).exists());
    }
}
