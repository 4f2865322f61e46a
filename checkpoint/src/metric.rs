//! Which checkpoint is the best, by a number that its manifest records.

use crate::{
    backend::Backend,
    error::CheckpointError,
    manifest::{Manifest, read_manifest},
    resume::{self, Committed, Damaged},
    runtime,
    store::RunStore,
};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Mutex, PoisonError},
};

/// A metric of [`Manifest::metrics`] and which of its values are good ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metric {
    /// Its name, for example `val_loss/ema`.
    pub name: String,
    /// Whether a higher value is better.
    pub higher_is_better: bool,
}

/// What is known of a committed checkpoint's metrics.
#[derive(Debug, Clone)]
pub(crate) enum Judged {
    /// Its metrics.
    Known(BTreeMap<String, f64>),
    /// Nothing: its manifest is damaged.
    Unreadable,
}

/// Metrics of manifests that were read once: a manifest never changes.
#[derive(Debug, Default)]
pub(crate) struct MetricsCache(Mutex<HashMap<(u64, u32), BTreeMap<String, f64>>>);

impl MetricsCache {
    /// What the manifest of `commit` says.
    pub async fn judge(&self, backend: &Backend, commit: &Committed) -> Result<Judged, CheckpointError> {
        let key = (commit.step, commit.attempt);
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        if let Some(metrics) = known {
            return Ok(Judged::Known(metrics));
        }
        match read_manifest(backend, commit.step, commit.attempt).await {
            Ok(manifest) => {
                self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key, manifest.metrics.clone());
                Ok(Judged::Known(manifest.metrics))
            }
            Err(error) if error.is_damage() => Ok(Judged::Unreadable),
            Err(error) => Err(error),
        }
    }
}

/// The commits that record `metric`, best first; of equal values the later step first.
pub(crate) fn ranked(judged: &[(Committed, Judged)], metric: &Metric) -> Vec<Committed> {
    let value = |(commit, judged): &(Committed, Judged)| match judged {
        Judged::Known(metrics) => Some((*metrics.get(&metric.name)?, commit.clone())),
        Judged::Unreadable => None,
    };
    let mut ranked: Vec<(f64, Committed)> = judged.iter().filter_map(value).collect();
    ranked.sort_by(|(a, left), (b, right)| {
        let by_value = if metric.higher_is_better { b.total_cmp(a) } else { a.total_cmp(b) };
        by_value.then(right.step.cmp(&left.step)).then(right.attempt.cmp(&left.attempt))
    });
    ranked.into_iter().map(|(_, commit)| commit).collect()
}

/// The commits that count, newest first, each with what its manifest says. Of several commits of a step only the newest counts.
pub(crate) async fn judge_all(store: &RunStore) -> Result<Vec<(Committed, Judged)>, CheckpointError> {
    let mut commits = resume::committed(&store.backend).await?;
    commits.dedup_by_key(|commit| commit.step);
    let mut judged = Vec::with_capacity(commits.len());
    for commit in commits {
        let known = store.metrics.judge(&store.backend, &commit).await?;
        judged.push((commit, known));
    }
    Ok(judged)
}

impl RunStore {
    /// The best commit that counts, by `metric`, and of which every byte is as it was written, with the better ones
    /// that are damaged, best first. `None` if no commit that can be read records the metric.
    ///
    /// # Errors
    /// [`CheckpointError::AllDamaged`] if all that record it are damaged; [`CheckpointError::UnknownVersion`]; store errors.
    pub fn best_valid(&self, metric: &Metric) -> Result<Option<(Manifest, Vec<Damaged>)>, CheckpointError> {
        runtime::wait(async {
            let ranked = ranked(&judge_all(self).await?, metric);
            resume::first_valid(&self.backend, ranked).await
        })
    }

    /// The names of all metrics that some commit that counts records.
    ///
    /// # Errors
    /// [`CheckpointError::UnknownVersion`]; store errors.
    pub fn metric_names(&self) -> Result<Vec<String>, CheckpointError> {
        let judged = runtime::wait(judge_all(self))?;
        let mut names: Vec<String> = judged
            .into_iter()
            .flat_map(|(_, judged)| match judged {
                Judged::Known(metrics) => metrics.into_keys().collect(),
                Judged::Unreadable => Vec::new(),
            })
            .collect();
        names.sort();
        names.dedup();
        Ok(names)
    }
}
