//! Deleting old checkpoints, never before a newer one has been read back.

use crate::{error::CheckpointError, keys, location::sync_folder, resume, runtime, store::RunStore};
use std::collections::{BTreeMap, BTreeSet};

impl RunStore {
    /// Deletes every step older than the newest `keep_last` committed ones, leftovers of attempts that never committed
    /// included, and returns the steps that were removed, oldest first. Before that it reads the newest checkpoint back in full.
    ///
    /// Of each step the manifests go first, and are durably gone before the first shard goes: a crash in between leaves shards that
    /// nothing points at, and they go next time.
    ///
    /// # Errors
    /// [`CheckpointError::KeepTooFew`]; if the newest checkpoint is damaged, that damage, and nothing was deleted; store errors.
    pub fn retain(&self, keep_last: usize) -> Result<Vec<u64>, CheckpointError> {
        if keep_last < 2 {
            return Err(CheckpointError::KeepTooFew { keep_last });
        }
        runtime::wait(async {
            let committed = resume::committed(&self.backend).await?;
            let steps: BTreeSet<u64> = committed.iter().map(|commit| commit.step).collect();
            let (Some(newest), Some(&oldest_kept)) = (committed.first(), steps.iter().rev().nth(keep_last - 1)) else {
                return Ok(Vec::new());
            };
            let mut old: BTreeMap<u64, Vec<String>> = BTreeMap::new();
            for key in self.backend.list(keys::CHECKPOINTS).await? {
                if let Some(step) = keys::parse_step(&key).filter(|&step| step < oldest_kept) {
                    old.entry(step).or_default().push(key);
                }
            }
            if old.is_empty() {
                return Ok(Vec::new());
            }
            resume::read_and_verify(&self.backend, newest).await?;
            let mut removed = Vec::new();
            for (step, objects) in old {
                self.remove_step(step, objects).await?;
                removed.push(step);
            }
            Ok(removed)
        })
    }

    pub(crate) async fn remove_step(&self, step: u64, objects: Vec<String>) -> Result<(), CheckpointError> {
        self.remove_objects(step, objects).await?;
        // Empty folders and half-written files of killed processes, which listings do not show.
        let folder = self.backend.folder.as_ref().map(|root| root.join(keys::step_folder(step)));
        match folder.map(std::fs::remove_dir_all) {
            Some(Err(e)) if e.kind() != std::io::ErrorKind::NotFound => Err(self.cannot_delete(step, &e)),
            _ => Ok(()),
        }
    }

    /// Deletes objects of one step: the manifests first, durably, then the rest.
    pub(crate) async fn remove_objects(&self, step: u64, objects: Vec<String>) -> Result<(), CheckpointError> {
        let (manifests, others): (Vec<String>, Vec<String>) =
            objects.into_iter().partition(|key| keys::parse_manifest(key).is_some());
        self.backend.delete(&manifests).await?;
        if let (Some(root), false) = (&self.backend.folder, manifests.is_empty()) {
            sync_folder(&root.join(keys::step_folder(step))).map_err(|e| self.cannot_delete(step, &e))?;
        }
        self.backend.delete(&others).await
    }

    pub(crate) fn cannot_delete(&self, step: u64, error: &std::io::Error) -> CheckpointError {
        CheckpointError::Store {
            url: self.backend.url.clone(),
            operation: "delete",
            key: keys::step_folder(step),
            reason: error.to_string(),
        }
    }
}
