//! Objects that no checkpoint needs, and removing checkpoints by hand.

use crate::{error::CheckpointError, keys, manifest::read_manifest, resume, runtime, store::RunStore};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Whether a process may be writing into the run folder right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activity {
    /// The newest attempt may be in the middle of a checkpoint: what it may be writing is left alone.
    Running,
    /// Nobody writes; the caller knows.
    Stopped,
}

/// An object that no checkpoint needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Garbage {
    /// Relative to the run folder.
    pub key: String,
    /// How it came to be there.
    pub reason: &'static str,
}

impl RunStore {
    /// The objects below `checkpoints/` that no commit that counts refers to: shards of checkpoints that were never committed,
    /// commits of dead branches with their shards and, in a local folder, half-written temporary files. What belongs to a damaged
    /// commit is not garbage: it may be repaired, see [`RunStore::remove`].
    ///
    /// # Errors
    /// Store errors.
    pub fn garbage(&self, activity: Activity) -> Result<Vec<Garbage>, CheckpointError> {
        runtime::wait(self.find_garbage(activity))
    }

    /// Deletes [`RunStore::garbage`] and returns it. Manifests go first: a crash in between leaves only more garbage.
    ///
    /// # Errors
    /// Store errors.
    pub fn collect_garbage(&self, activity: Activity) -> Result<Vec<Garbage>, CheckpointError> {
        runtime::wait(async {
            let garbage = self.find_garbage(activity).await?;
            let mut by_step: BTreeMap<u64, Vec<String>> = BTreeMap::new();
            for Garbage { key, .. } in &garbage {
                let Some(step) = keys::parse_step(key) else { continue };
                match (&self.backend.folder, key.contains('#')) {
                    // Not an object: the store itself would not find it.
                    (Some(root), true) => {
                        std::fs::remove_file(root.join(key)).map_err(|e| self.cannot_delete(step, &e))?
                    }
                    _ => by_step.entry(step).or_default().push(key.clone()),
                }
            }
            for (step, keys) in by_step {
                self.remove_objects(step, keys).await?;
            }
            if let Some(root) = &self.backend.folder {
                remove_empty_folders(&root.join(keys::CHECKPOINTS));
            }
            Ok(garbage)
        })
    }

    /// Removes everything of a step, valid or damaged, and returns the keys. Leaves the run where the next older checkpoint is.
    ///
    /// # Errors
    /// Store errors; what was removed by then stays removed, manifests first.
    pub fn remove(&self, step: u64) -> Result<Vec<String>, CheckpointError> {
        runtime::wait(async {
            let all = self.backend.list(&keys::step_folder(step)).await?;
            self.remove_step(step, all.clone()).await?;
            Ok(all)
        })
    }

    async fn find_garbage(&self, activity: Activity) -> Result<Vec<Garbage>, CheckpointError> {
        let backend = &self.backend;
        // Objects first: what is committed after this listing cannot be in it as garbage.
        let listing = backend.list(keys::CHECKPOINTS).await?;
        let committed = resume::committed(backend).await?;
        let mut needed = BTreeSet::new();
        let mut unreadable = BTreeSet::new();
        for commit in &committed {
            match read_manifest(backend, commit.step, commit.attempt).await {
                Ok(manifest) => needed.extend(manifest.shards.into_iter().map(|shard| shard.key)),
                Err(error) if error.is_damage() => _ = unreadable.insert((commit.step, commit.attempt)),
                Err(error) => return Err(error),
            }
            needed.insert(commit.key.clone());
        }
        let newest_attempt = crate::attempt::attempt_numbers(backend).await?.into_iter().max();
        let last_step = |attempt| committed.iter().filter(|c| c.attempt == attempt).map(|c| c.step).max();
        let in_flight = |step: u64, attempt: u32| {
            activity == Activity::Running && Some(attempt) == newest_attempt && last_step(attempt) < Some(step)
        };
        let judge = |key: String| {
            let (step, attempt) = keys::parse_object(&key)?;
            if needed.contains(&key) || unreadable.contains(&(step, attempt)) || in_flight(step, attempt) {
                return None;
            }
            let reason = match keys::parse_manifest(&key) {
                Some(_) => "commit of a branch that a later attempt left",
                None => "shard of no commit that counts",
            };
            Some(Garbage { key, reason })
        };
        let mut garbage: Vec<Garbage> = listing.into_iter().filter_map(judge).collect();
        if let (Some(root), Activity::Stopped) = (&backend.folder, activity) {
            let temporary = temporary_files(&root.join(keys::CHECKPOINTS)).map_err(|e| CheckpointError::Store {
                url: backend.url.clone(),
                operation: "list",
                key: keys::CHECKPOINTS.to_owned(),
                reason: e.to_string(),
            })?;
            let key = |path: &Path| Some(path.strip_prefix(root).ok()?.to_str()?.to_owned());
            garbage.extend(
                temporary.iter().filter_map(|path| {
                    Some(Garbage { key: key(path)?, reason: "half-written file of a killed process" })
                }),
            );
        }
        garbage.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(garbage)
    }
}

/// Files that a local store was writing when its process died (`NAME#N`); its own listings do not show them.
fn temporary_files(folder: &Path) -> std::io::Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match std::fs::read_dir(&folder) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let suffix = name.rsplit_once('#').map(|(_, number)| number);
            if path.is_dir() {
                folders.push(path);
            } else if suffix.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit())) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Folders are not objects: a local store leaves them behind. One that is not empty stays, and so does one that cannot be
/// removed: nobody reads it.
fn remove_empty_folders(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            remove_empty_folders(&path);
            let _ = std::fs::remove_dir(&path);
        }
    }
}
