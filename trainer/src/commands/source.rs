//! Where a command reads a checkpoint from.

use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointReader, Manifest, RunStore};

/// Opens the checkpoint at `url`: a run folder (its newest valid checkpoint), `<run>/checkpoints/step-…` (the newest commit
/// of that step) or `<run>/checkpoints/step-…/manifest-….json`.
///
/// # Errors
/// No such run or checkpoint, or it is damaged.
pub fn open(url: &str) -> Result<(RunStore, Manifest)> {
    let here = std::env::current_dir().context("the current folder")?;
    let url = configs::location::resolve(&here, url);
    let (run, wanted) = match url.split_once("/checkpoints/step-") {
        Some((run, rest)) => (run.to_owned(), Some(rest.to_owned())),
        None => (url.trim_end_matches('/').to_owned(), None),
    };
    let store = RunStore::open_existing(&run)?;
    let Some(wanted) = wanted else {
        let Some((manifest, damaged)) = store.newest_valid()? else {
            bail!("{}: no valid checkpoint there", store.url());
        };
        for damaged in damaged {
            eprintln!("trainer: warning: damaged checkpoint passed over: {damaged}");
        }
        return Ok((store, manifest));
    };
    let (step, file) = wanted.split_once('/').unwrap_or((&wanted, ""));
    let step: u64 = step.parse().with_context(|| format!("`{wanted}`: no step number"))?;
    let fits = |key: &str| file.is_empty() || key.ends_with(&format!("/{file}"));
    let committed = store.committed()?;
    let Some(commit) = committed.iter().find(|commit| commit.step == step && fits(&commit.key)) else {
        let steps: Vec<String> = committed.iter().map(|commit| commit.step.to_string()).collect();
        bail!("{}: no committed checkpoint of step {step} {file}; there are steps {}", store.url(), steps.join(", "));
    };
    let manifest = store.manifest(commit)?;
    Ok((store, manifest))
}

/// A reader of the checkpoint at `url`, see [`open`].
///
/// # Errors
/// As [`open`].
pub fn reader(url: &str) -> Result<CheckpointReader> {
    let (store, manifest) = open(url)?;
    Ok(store.read(&manifest))
}
