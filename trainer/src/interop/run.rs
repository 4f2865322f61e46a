//! Opening one of our checkpoints by URL, to read it.

use super::InteropError;
use crate::validation::metric;
use checkpoint::{CheckpointReader, Damaged, Manifest, RunStore};
use configs::validation::{EMA_SECTION, loss_metric};
use std::path::PathBuf;

/// What follows a run's URL in that of one of its checkpoints.
pub(super) const CHECKPOINTS: &str = "/checkpoints/step-";

/// The local file that `location` (a path or a `file://` URL) names; `None` where there is none, or where it is a manifest
/// of ours, which [`open`] takes.
pub fn local_file(location: &str) -> Option<PathBuf> {
    let is_manifest = location.contains(CHECKPOINTS) && location.ends_with(".json");
    configs::location::local_path(location).filter(|path| !is_manifest && path.is_file())
}

/// Which checkpoint of a run is meant.
#[derive(Debug, PartialEq)]
enum Wanted {
    Newest,
    /// By the run's `checkpoint.best_metric`, or by a metric of this name.
    Best(Option<String>),
    /// What follows `step-`.
    Step(String),
}

/// Opens the checkpoint at `url`: a run folder (its newest valid checkpoint), `<run>/checkpoints/step-…` (the newest commit
/// of that step), `<run>/checkpoints/step-…/manifest-….json`, `<run>/checkpoints/best` (the valid one with the best value of
/// the run's `checkpoint.best_metric`) or `<run>/checkpoints/best/METRIC`.
///
/// # Errors
/// No such run or checkpoint, or it is damaged.
pub fn open(url: &str) -> Result<(RunStore, Manifest), InteropError> {
    let (run, wanted) = run_and_wanted(url)?;
    let store = RunStore::open_existing(&run)?;
    let found = match wanted {
        Wanted::Newest => store.newest_valid()?.ok_or_else(|| none(&store, "no valid checkpoint there".to_owned()))?,
        Wanted::Best(name) => best(&store, name)?,
        Wanted::Step(wanted) => (of_step(&store, &wanted)?, Vec::new()),
    };
    let (manifest, damaged) = found;
    for damaged in damaged {
        eprintln!("trainer: warning: damaged checkpoint passed over: {damaged}");
    }
    Ok((store, manifest))
}

fn none(store: &RunStore, reason: String) -> InteropError {
    InteropError::NoCheckpoint { url: store.url().to_owned(), reason }
}

fn best(store: &RunStore, name: Option<String>) -> Result<(Manifest, Vec<Damaged>), InteropError> {
    let name = match name {
        Some(name) => name,
        None => recorded_best_metric(store)?.unwrap_or_else(|| loss_metric(EMA_SECTION)),
    };
    if let Some(found) = store.best_valid(&metric(&name))? {
        return Ok(found);
    }
    let recorded = match store.metric_names()? {
        names if names.is_empty() => "no metric at all; set `validation.url` to measure some".to_owned(),
        names => names.join(", "),
    };
    Err(none(store, format!("no checkpoint records the metric `{name}`; recorded is {recorded}")))
}

/// What the newest commit that can be read says its run's `checkpoint.best_metric` is.
fn recorded_best_metric(store: &RunStore) -> Result<Option<String>, InteropError> {
    for commit in store.committed()? {
        match store.manifest(&commit) {
            Ok(manifest) => return Ok(manifest.config["checkpoint"]["best_metric"].as_str().map(str::to_owned)),
            Err(error) if error.is_damage() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

fn of_step(store: &RunStore, wanted: &str) -> Result<Manifest, InteropError> {
    let (step, file) = wanted.split_once('/').unwrap_or((wanted, ""));
    let step: u64 = step.parse().map_err(|_| none(store, format!("`step-{wanted}`: no step number")))?;
    let fits = |key: &str| file.is_empty() || key.ends_with(&format!("/{file}"));
    let committed = store.committed()?;
    let Some(commit) = committed.iter().find(|commit| commit.step == step && fits(&commit.key)) else {
        let steps: Vec<String> = committed.iter().map(|commit| commit.step.to_string()).collect();
        let steps = steps.join(", ");
        return Err(none(store, format!("no committed checkpoint of step {step} {file}; there are steps {steps}")));
    };
    Ok(store.manifest(commit)?)
}

/// The run of a URL as [`open`] takes it, and which checkpoint of it.
fn run_and_wanted(url: &str) -> Result<(String, Wanted), InteropError> {
    let here = std::env::current_dir().map_err(InteropError::io(".".as_ref(), "the current folder"))?;
    let url = configs::location::resolve(&here, url);
    if let Some((run, step)) = url.split_once(CHECKPOINTS) {
        return Ok((run.to_owned(), Wanted::Step(step.to_owned())));
    }
    let url = url.trim_end_matches('/');
    if let Some(run) = url.strip_suffix("/checkpoints/best") {
        return Ok((run.to_owned(), Wanted::Best(None)));
    }
    Ok(match url.split_once("/checkpoints/best/") {
        Some((run, metric)) => (run.to_owned(), Wanted::Best(Some(metric.to_owned()))),
        None => (url.to_owned(), Wanted::Newest),
    })
}

/// A reader of `manifest`, which another rank has found at `url` (see [`open`]).
///
/// # Errors
/// No such run.
pub fn reader_of(url: &str, manifest: &Manifest) -> Result<CheckpointReader, InteropError> {
    Ok(RunStore::open_existing(&run_and_wanted(url)?.0)?.read(manifest))
}

/// A reader of the checkpoint at `url`, see [`open`].
///
/// # Errors
/// As [`open`].
pub fn reader(url: &str) -> Result<CheckpointReader, InteropError> {
    let (store, manifest) = open(url)?;
    Ok(store.read(&manifest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::{AttemptInfo, Commit, F32Bytes, ShardId, Slice};
    use serde_json::json;

    #[test]
    fn the_best_checkpoint_is_found_by_the_runs_metric_or_by_any_other() {
        let run = "memory:///best-of-a-run";
        let store = RunStore::open(run).unwrap();
        let attempt = store.claim_attempt(&AttemptInfo { world_size: 1, ..AttemptInfo::default() }).unwrap();
        for (step, ema, precision) in [(1, 0.5, 0.9), (2, 0.3, 0.7), (3, 0.4, 0.8)] {
            let id = ShardId { attempt, step, rank: 0, world_size: 1 };
            let slice = Slice { name: "model/w", shape: &[1], start_numel: 0, data: F32Bytes::from(&[1.0][..]) };
            let config = json!({"checkpoint": {"best_metric": "val_loss/ema"}});
            let metrics = [("val_loss/ema", ema), ("precision/ema", precision)];
            let metrics = metrics.map(|(name, value)| (name.to_owned(), value)).into();
            let shards = vec![store.write_shard(&id, &[slice]).unwrap()];
            let commit = Commit { attempt, step, optimizer_step: step, config, metrics, shards, ..Commit::default() };
            store.commit(commit).unwrap();
        }
        let step_at = |url: &str| open(url).map(|(_, manifest)| manifest.step);
        assert_eq!(step_at(run).unwrap(), 3);
        assert_eq!(step_at(&format!("{run}/checkpoints/step-000000001")).unwrap(), 1);
        assert_eq!(step_at(&format!("{run}/checkpoints/best")).unwrap(), 2);
        assert_eq!(step_at(&format!("{run}/checkpoints/best/")).unwrap(), 2);
        // More precision is better.
        assert_eq!(step_at(&format!("{run}/checkpoints/best/precision/ema")).unwrap(), 1);
        let refused = step_at(&format!("{run}/checkpoints/best/fid/ema")).unwrap_err().to_string();
        assert!(refused.contains("`fid/ema`") && refused.contains("precision/ema, val_loss/ema"), "{refused}");
    }
}
