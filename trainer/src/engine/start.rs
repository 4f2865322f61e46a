//! Where a start of a run goes on from: its newest checkpoint, given weights, or nothing.

use super::agree::{Agreed, agree, decided_by_rank_0, work_together};
use super::bucket::Buckets;
use super::initial::Initial;
use super::snapshot::restore;
use crate::ema::Average;
use crate::ffi::TorchError;
use crate::interop;
use crate::model::Model;
use crate::recipe::Recipe;
use anyhow::{Context, Result, bail};
use checkpoint::{CheckpointError, Committed, Damaged, Manifest, RunStore};
use collective::Collective;
use configs::{Reduction, RunConfig};
use serde_json::Value;

/// First weights from elsewhere.
pub struct Initialised {
    /// The checkpoint, file or folder, redacted.
    pub from: String,
    /// What is not as it was there.
    pub changes: Vec<String>,
}

/// Loads the newest valid checkpoint, which this config must be one to continue, into what `zeroed` makes; `None` where there
/// is no checkpoint. All ranks call it together: each reads and verifies what it needs and its share of what nobody needs,
/// so that every byte is verified once.
///
/// # Errors
/// [`Agreed`] if only damaged ones are left, the config is of another experiment, or a rank cannot read the store.
pub(super) fn resume(
    config: &RunConfig,
    record: &Value,
    store: &RunStore,
    collective: &dyn Collective,
    averages: &[Average],
    zeroed: impl Fn() -> Result<Buckets, TorchError>,
) -> Result<Option<(Manifest, Buckets)>> {
    let mut search = Search { config, record, store, newest_first: None, damaged: Vec::new() };
    let mut buckets = None;
    loop {
        let Some(manifest) = decided_by_rank_0(collective, || search.next())? else { return Ok(None) };
        let loaded = match &mut buckets {
            Some(buckets) => &*buckets,
            none => &*none.insert(zeroed()?),
        };
        let part = (collective.rank(), collective.world_size());
        let restored = work_together(collective, || restore(store, &manifest, loaded, averages, part))?;
        match damage(collective, restored)? {
            None => return Ok(buckets.map(|buckets| (manifest, buckets))),
            Some(reason) => search.pass_over(manifest.step, manifest.attempt, reason, collective.rank() == 0),
        }
    }
}

/// What is damaged about a checkpoint, as the first rank that noticed tells it; the same on all ranks.
fn damage(collective: &dyn Collective, restored: Result<()>) -> Result<Option<String>> {
    let is_damage = |error: &CheckpointError| error.is_damage();
    let mine = match restored {
        Err(error) if error.downcast_ref().is_some_and(is_damage) => Ok(format!("{error:#}")),
        other => other.map(|()| String::new()),
    };
    let mine = agree(collective, mine)?;
    let all = collective.gather_bytes(mine.as_bytes()).context("agreeing on a checkpoint")?;
    let first = all.iter().find(|reason| !reason.is_empty());
    Ok(first.map(|reason| String::from_utf8_lossy(reason).into_owned()))
}

/// Goes through a run's checkpoints; rank 0's business.
struct Search<'a> {
    config: &'a RunConfig,
    record: &'a Value,
    store: &'a RunStore,
    newest_first: Option<std::vec::IntoIter<Committed>>,
    /// Those passed over so far.
    damaged: Vec<Damaged>,
}

impl Search<'_> {
    /// The next checkpoint whose manifest is sound. `None` if there never was one.
    fn next(&mut self) -> Result<Option<Manifest>> {
        let context = "looking for a checkpoint to resume from";
        let mut newest_first = match self.newest_first.take() {
            Some(rest) => rest,
            None => self.store.committed().context(context)?.into_iter(),
        };
        let url = self.store.url();
        let manifest = loop {
            if let (configs::OnDamaged::Fail, Some(damaged)) = (self.config.checkpoint.on_damaged, self.damaged.last())
            {
                bail!("damaged checkpoint in {url}: {damaged}; checkpoint.on_damaged = \"fail\"");
            }
            let Some(commit) = newest_first.next() else {
                if self.damaged.is_empty() {
                    return Ok(None);
                }
                let damaged = std::mem::take(&mut self.damaged);
                return Err(CheckpointError::AllDamaged { url: url.to_owned(), damaged }).context(context);
            };
            match self.store.manifest(&commit) {
                Ok(manifest) => break manifest,
                Err(error) if error.is_damage() => {
                    self.pass_over(commit.step, commit.attempt, error.to_string(), true);
                }
                Err(error) => return Err(error).context(context),
            }
        };
        self.newest_first = Some(newest_first);
        self.check(&manifest)?;
        Ok(Some(manifest))
    }

    fn pass_over(&mut self, step: u64, attempt: u32, reason: String, aloud: bool) {
        let damaged = Damaged { step, attempt, reason };
        if aloud && self.config.checkpoint.on_damaged == configs::OnDamaged::Fallback {
            eprintln!("trainer: warning: damaged checkpoint passed over: {damaged}");
        }
        self.damaged.push(damaged);
    }

    /// Whether this config continues the run.
    fn check(&self, manifest: &Manifest) -> Result<()> {
        let Self { config, record, store, .. } = self;
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
            eprintln!(
                "trainer: warning: [init] is ignored: the run goes on from step {step}, and it began from elsewhere"
            );
        }
        if manifest.step > config.train.steps {
            bail!("{} is at step {}, beyond `train.steps` = {}", store.url(), manifest.step, config.train.steps);
        }
        Ok(())
    }
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

/// With fast sums the bits depend on the number of ranks: the record says which numbers made which steps, so that the run can be
/// repeated.
pub(super) fn record_world_size(
    record: &mut Value,
    resumed: Option<&Manifest>,
    config: &RunConfig,
    collective: &dyn Collective,
) {
    const KEY: &str = "fast_world_sizes";
    if config.reduction != Reduction::Fast {
        return;
    }
    let world_size = collective.world_size();
    let mut history = resumed.and_then(|manifest| manifest.config["run"][KEY].as_array().cloned()).unwrap_or_default();
    let before = history.last().map(|last| last["world_size"].clone());
    if before.as_ref() != Some(&Value::from(world_size)) {
        let from_step = resumed.map_or(0, |manifest| manifest.step) + 1;
        if let Some(before) = before.filter(|_| collective.rank() == 0) {
            eprintln!(
                "trainer: note: reduction = \"fast\": steps from {from_step} on are those of {world_size} ranks, where the run had \
                 {before}; sums are rounded otherwise, nothing else changes"
            );
        }
        history.push(serde_json::json!({ "from_step": from_step, "world_size": world_size }));
    }
    record["run"][KEY] = history.into();
}
