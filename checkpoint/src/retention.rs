//! Deleting old checkpoints, never before a newer one has been read back.

use crate::{
    error::CheckpointError,
    keys,
    location::sync_folder,
    metric::{Judged, Metric, judge_all, ranked},
    resume, runtime,
    store::RunStore,
};
use std::collections::{BTreeMap, BTreeSet};

/// Which committed checkpoints [`RunStore::retain`] keeps: those that any of the rules names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retention {
    /// The newest so many steps; at least 2.
    pub keep_last: usize,
    /// Every step that is a multiple of this number, for ever; 0 for none.
    pub keep_every: u64,
    /// The best so many steps by a metric. A step whose manifest is damaged might be one of them and is kept, too.
    pub keep_best: Option<(usize, Metric)>,
}

impl Retention {
    /// Keeps the newest `keep_last` steps and no others.
    pub fn last(keep_last: usize) -> Self {
        Self { keep_last, keep_every: 0, keep_best: None }
    }
}

impl RunStore {
    /// Deletes every step older than the newest `keep_last` committed ones that no other rule keeps, leftovers of attempts that
    /// never committed included, and returns the steps that were removed, oldest first. Before that it reads the newest
    /// checkpoint back in full.
    ///
    /// Of each step the manifests go first, and are durably gone before the first shard goes: a crash in between leaves shards that
    /// nothing points at, and they go next time.
    ///
    /// # Errors
    /// [`CheckpointError::KeepTooFew`]; if the newest checkpoint is damaged, that damage, and nothing was deleted; store errors.
    pub fn retain(&self, retention: &Retention) -> Result<Vec<u64>, CheckpointError> {
        let keep_last = retention.keep_last;
        if keep_last < 2 {
            return Err(CheckpointError::KeepTooFew { keep_last });
        }
        runtime::wait(async {
            let committed = resume::committed(&self.backend).await?;
            let steps: BTreeSet<u64> = committed.iter().map(|commit| commit.step).collect();
            let (Some(newest), Some(&oldest_kept)) = (committed.first(), steps.iter().rev().nth(keep_last - 1)) else {
                return Ok(Vec::new());
            };
            let kept = self.kept_before(oldest_kept, &steps, retention).await?;
            let mut old: BTreeMap<u64, Vec<String>> = BTreeMap::new();
            for key in self.backend.list(keys::CHECKPOINTS).await? {
                if let Some(step) = keys::parse_step(&key).filter(|step| *step < oldest_kept && !kept.contains(step)) {
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

    /// The committed steps before `oldest_kept` that some rule keeps.
    async fn kept_before(
        &self,
        oldest_kept: u64,
        committed: &BTreeSet<u64>,
        retention: &Retention,
    ) -> Result<BTreeSet<u64>, CheckpointError> {
        let every = retention.keep_every;
        let older = committed.range(..oldest_kept).copied();
        let mut kept: BTreeSet<u64> = older.filter(|step| every > 0 && step.is_multiple_of(every)).collect();
        if let Some((count, metric)) = &retention.keep_best {
            let judged = judge_all(self).await?;
            kept.extend(ranked(&judged, metric).iter().take(*count).map(|commit| commit.step));
            let unknown = judged.iter().filter(|(_, judged)| matches!(judged, Judged::Unreadable));
            kept.extend(unknown.map(|(commit, _)| commit.step));
        }
        Ok(kept)
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
