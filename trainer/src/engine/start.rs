//! Where a start of a run goes on from: its newest checkpoint, given weights, or nothing.

use super::agree::{Agreed, agree, decided_by_rank_0};
use super::initial::Initial;
use crate::interop;
use crate::model::Model;
use crate::recipe::Recipe;
use anyhow::{Context, Result, bail};
use checkpoint::{Manifest, RunStore};
use collective::Collective;
use configs::RunConfig;
use serde_json::Value;

/// First weights from elsewhere.
pub struct Initialised {
    /// The checkpoint, file or folder, redacted.
    pub from: String,
    /// What is not as it was there.
    pub changes: Vec<String>,
}

/// The newest valid checkpoint, which this config must be one to continue.
pub(super) fn find_checkpoint(config: &RunConfig, record: &Value, store: &RunStore) -> Result<Option<Manifest>> {
    let Some((manifest, damaged)) = store.newest_valid().context("looking for a checkpoint to resume from")? else {
        return Ok(None);
    };
    let damaged: Vec<String> = damaged.iter().map(ToString::to_string).collect();
    if !damaged.is_empty() && config.checkpoint.on_damaged == configs::OnDamaged::Fail {
        bail!("damaged checkpoints in {}: {}; checkpoint.on_damaged = \"fail\"", store.url(), damaged.join("; "));
    }
    for damaged in damaged {
        eprintln!("trainer: warning: damaged checkpoint passed over: {damaged}");
    }
    let changes = configs::changed_experiment_keys(&manifest.config, record);
    if !changes.is_empty() {
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        bail!(
            "{} holds another experiment (step {}): {}; undo the change, or give a new `run.url`",
            store.url(),
            manifest.step,
            changes.join("; ")
        );
    }
    let origin = |config: &Value, key: &str| config["init"][key].clone();
    let same_origin = |(key, value): (&String, &Value)| origin(&manifest.config, key) == *value;
    if record["init"].as_object().is_some_and(|init| !init.iter().all(same_origin)) {
        let step = manifest.step;
        eprintln!("trainer: warning: [init] is ignored: the run goes on from step {step}, and it began from elsewhere");
    }
    if manifest.step > config.train.steps {
        bail!("{} is at step {}, beyond `train.steps` = {}", store.url(), manifest.step, config.train.steps);
    }
    Ok(Some(manifest))
}

/// The weights that `[init]` gives a new run, on every rank.
pub(super) fn load_initial(
    config: &RunConfig,
    recipe: &Recipe,
    model: &dyn Model,
    collective: &dyn Collective,
) -> Result<(Initial, Option<Initialised>)> {
    let source = match &config.init {
        // Another process may be adding checkpoints to a run while the ranks read.
        Some(init) => Some(decided_by_rank_0(collective, || interop::pinned(&init.from).context("`init.from`"))?),
        None => None,
    };
    let initial = Initial::of(config, recipe, model, source.as_deref());
    let mut initial = agree(collective, initial.map_err(Into::into))?;
    let sum = agree(collective, initial.checksum().map_err(Into::into))?;
    let sums = collective.gather_bytes(&sum.to_le_bytes()).context("agreeing on the start")?;
    if let Some(rank) = sums.iter().position(|sum| *sum != sums[0]) {
        let reason = "it has read other weights from `init.from` than rank 0; give a place that all ranks share";
        return Err(Agreed { rank, reason: reason.to_owned() }.into());
    }
    let changes = std::mem::take(&mut initial.changes);
    let initialised = source.map(|source| Initialised { from: configs::location::redact(&source), changes });
    Ok((initial, initialised))
}

/// A run's `init` says what it began from for ever: a resume repeats the first start's, whatever the config says by now.
pub(super) fn record_origin(record: &mut Value, resumed: Option<&Manifest>, initialised: Option<&Initialised>) {
    if let Some(manifest) = resumed {
        match (manifest.config.get("init"), record.as_object_mut()) {
            (Some(origin), _) => record["init"] = origin.clone(),
            (None, Some(record)) => drop(record.remove("init")),
            (None, None) => {}
        }
    }
    if let Some(Initialised { from, changes }) = initialised {
        record["init"]["source"] = from.as_str().into();
        record["init"]["changes"] = changes.as_slice().into();
    }
}
