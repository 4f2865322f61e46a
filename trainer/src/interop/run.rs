//! Opening one of our checkpoints by URL, to read it.

use super::InteropError;
use checkpoint::{CheckpointReader, Manifest, RunStore};
use std::path::PathBuf;

/// What follows a run's URL in that of one of its checkpoints.
pub(super) const CHECKPOINTS: &str = "/checkpoints/step-";

/// The local file that `location` (a path or a `file://` URL) names; `None` where there is none, or where it is a manifest
/// of ours, which [`open`] takes.
pub fn local_file(location: &str) -> Option<PathBuf> {
    configs::location::local_path(location).filter(|path| !location.contains(CHECKPOINTS) && path.is_file())
}

/// Opens the checkpoint at `url`: a run folder (its newest valid checkpoint), `<run>/checkpoints/step-…` (the newest commit
/// of that step) or `<run>/checkpoints/step-…/manifest-….json`.
///
/// # Errors
/// No such run or checkpoint, or it is damaged.
pub fn open(url: &str) -> Result<(RunStore, Manifest), InteropError> {
    let (run, wanted) = run_and_step(url)?;
    let store = RunStore::open_existing(&run)?;
    let none = |reason: String| InteropError::NoCheckpoint { url: store.url().to_owned(), reason };
    let Some(wanted) = wanted else {
        let Some((manifest, damaged)) = store.newest_valid()? else {
            return Err(none("no valid checkpoint there".to_owned()));
        };
        for damaged in damaged {
            eprintln!("trainer: warning: damaged checkpoint passed over: {damaged}");
        }
        return Ok((store, manifest));
    };
    let (step, file) = wanted.split_once('/').unwrap_or((&wanted, ""));
    let step: u64 = step.parse().map_err(|_| none(format!("`step-{wanted}`: no step number")))?;
    let fits = |key: &str| file.is_empty() || key.ends_with(&format!("/{file}"));
    let committed = store.committed()?;
    let Some(commit) = committed.iter().find(|commit| commit.step == step && fits(&commit.key)) else {
        let steps: Vec<String> = committed.iter().map(|commit| commit.step.to_string()).collect();
        return Err(none(format!(
            "no committed checkpoint of step {step} {file}; there are steps {}",
            steps.join(", ")
        )));
    };
    let manifest = store.manifest(commit)?;
    Ok((store, manifest))
}

/// The run of a URL as [`open`] takes it, and what follows `…/checkpoints/step-`, where that is in it.
fn run_and_step(url: &str) -> Result<(String, Option<String>), InteropError> {
    let here = std::env::current_dir().map_err(InteropError::io(".".as_ref(), "the current folder"))?;
    let url = configs::location::resolve(&here, url);
    Ok(match url.split_once(CHECKPOINTS) {
        Some((run, rest)) => (run.to_owned(), Some(rest.to_owned())),
        None => (url.trim_end_matches('/').to_owned(), None),
    })
}

/// A reader of `manifest`, which another rank has found at `url` (see [`open`]).
///
/// # Errors
/// No such run.
pub fn reader_of(url: &str, manifest: &Manifest) -> Result<CheckpointReader, InteropError> {
    Ok(RunStore::open_existing(&run_and_step(url)?.0)?.read(manifest))
}

/// A reader of the checkpoint at `url`, see [`open`].
///
/// # Errors
/// As [`open`].
pub fn reader(url: &str) -> Result<CheckpointReader, InteropError> {
    let (store, manifest) = open(url)?;
    Ok(store.read(&manifest))
}
