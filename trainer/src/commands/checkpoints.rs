//! `trainer checkpoints`: what a run folder holds, whether it is whole, and getting rid of some of it.

use anyhow::{Result, bail};
use checkpoint::{Activity, Committed, Manifest, RunStore};
use clap::Subcommand;
use serde_json::json;
use std::time::{Duration, Instant};

/// Options of `trainer checkpoints`.
#[derive(clap::Args)]
pub struct CheckpointsArgs {
    /// The run folder.
    url: String,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    /// The committed checkpoints, newest first.
    List {
        /// One JSON object a line.
        #[arg(long)]
        json: bool,
    },
    /// Reads every byte of the committed checkpoints, or of these steps; fails if any is damaged.
    Verify {
        /// Steps; all when none is given.
        steps: Vec<u64>,
    },
    /// Asks the process that trains this run for a checkpoint now. It looks for requests every second (in a remote run folder
    /// every ten), saves after its step, goes on, and removes the request when the checkpoint is committed.
    Request {
        /// Waits for that at most so many seconds.
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "600")]
        wait: Option<u64>,
    },
    /// Deletes what no checkpoint needs: shards that were never committed, commits of branches that a later start left.
    Gc {
        /// Only says what would go.
        #[arg(long)]
        dry_run: bool,
        /// No process of this run is alive: also deletes what the newest start may have been writing.
        #[arg(long)]
        stopped: bool,
    },
    /// Removes checkpoints by step, damaged ones too.
    Rm {
        /// Their steps.
        #[arg(required = true)]
        steps: Vec<u64>,
        /// Even if no valid checkpoint is left, so that the run starts again from nothing.
        #[arg(long)]
        force: bool,
    },
}

/// Runs the action.
///
/// # Errors
/// No such run, a damaged checkpoint (`verify`), the last valid one to be removed (`rm`), what the store reports.
pub fn checkpoints(args: &CheckpointsArgs) -> Result<()> {
    let here = std::env::current_dir()?;
    let url = configs::location::resolve(&here, &args.url);
    let store = RunStore::open_existing(url.trim_end_matches('/'))?;
    match &args.action {
        Action::List { json } => list(&store, *json),
        Action::Verify { steps } => verify(&store, steps),
        Action::Request { wait } => request(&store, *wait),
        Action::Gc { dry_run, stopped } => {
            let activity = if *stopped { Activity::Stopped } else { Activity::Running };
            let garbage = if *dry_run { store.garbage(activity)? } else { store.collect_garbage(activity)? };
            for object in &garbage {
                println!("{}  ({})", object.key, object.reason);
            }
            println!("{} objects {}", garbage.len(), if *dry_run { "would be deleted" } else { "deleted" });
            Ok(())
        }
        Action::Rm { steps, force } => remove(&store, steps, *force),
    }
}

fn request(store: &RunStore, wait_s: Option<u64>) -> Result<()> {
    let key = store.request()?;
    println!("asked: {}/{key}", store.url().trim_end_matches('/'));
    let Some(wait_s) = wait_s else { return Ok(()) };
    let give_up = Instant::now() + Duration::from_secs(wait_s);
    while store.requests()?.contains(&key) {
        if Instant::now() > give_up {
            let url = store.url();
            bail!(
                "{url}: no checkpoint was committed within {wait_s} s; does a process train this run? The request stays"
            );
        }
        std::thread::sleep(Duration::from_millis(500));
    }
    match store.committed()?.first() {
        Some(newest) => println!("committed: step {}", newest.step),
        None => bail!("{}: the request is gone, but there is no checkpoint", store.url()),
    }
    Ok(())
}

fn list(store: &RunStore, as_json: bool) -> Result<()> {
    if !as_json {
        println!("{:>12} {:>8} {:>6} {:>12}  metrics", "step", "attempt", "ranks", "bytes");
    }
    for commit in store.committed()? {
        let Committed { step, attempt, key } = &commit;
        let manifest = match store.manifest(&commit) {
            Ok(manifest) => manifest,
            Err(error) if error.is_damage() => {
                match as_json {
                    true => println!("{}", json!({"step": step, "attempt": attempt, "damaged": error.to_string()})),
                    false => println!("{step:>12} {attempt:>8} {error}"),
                }
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let Manifest { optimizer_step, resumed_from, world_size, created_unix_ms, metrics, .. } = &manifest;
        let bytes: u64 = manifest.shards.iter().map(|shard| shard.bytes).sum();
        if as_json {
            let line = json!({
                "step": step, "attempt": attempt, "manifest": key, "optimizer_step": optimizer_step,
                "resumed_from": resumed_from, "world_size": world_size, "created_unix_ms": created_unix_ms,
                "objects": manifest.shards.len(), "bytes": bytes, "metrics": metrics,
                "decision_log": manifest.decision_log,
            });
            println!("{line}");
        } else {
            let metrics: Vec<String> = metrics.iter().map(|(name, value)| format!("{name} {value:.5}")).collect();
            println!("{step:>12} {attempt:>8} {world_size:>6} {bytes:>12}  {}", metrics.join("  "));
        }
    }
    Ok(())
}

fn verify(store: &RunStore, steps: &[u64]) -> Result<()> {
    let committed = chosen(store, steps)?;
    let mut damaged = 0;
    for commit in &committed {
        match is_valid(store, commit)? {
            None => println!("step {} (attempt {}): every byte is as it was written", commit.step, commit.attempt),
            Some(reason) => {
                damaged += 1;
                println!("step {} (attempt {}): DAMAGED: {reason}", commit.step, commit.attempt);
            }
        }
    }
    if damaged > 0 {
        bail!("{}: {damaged} of {} checkpoints are damaged; `rm` removes them by step", store.url(), committed.len());
    }
    Ok(())
}

/// `None` when it is valid, else which object is damaged and how.
fn is_valid(store: &RunStore, commit: &Committed) -> Result<Option<String>> {
    match store.manifest(commit).and_then(|manifest| store.verify(&manifest)) {
        Ok(()) => Ok(None),
        Err(error) if error.is_damage() => Ok(Some(error.to_string())),
        Err(error) => Err(error.into()),
    }
}

fn chosen(store: &RunStore, steps: &[u64]) -> Result<Vec<Committed>> {
    let committed = store.committed()?;
    if let Some(step) = steps.iter().find(|&&step| committed.iter().all(|commit| commit.step != step)) {
        let there: Vec<String> = committed.iter().map(|commit| commit.step.to_string()).collect();
        bail!("{}: no committed checkpoint of step {step}; there are steps {}", store.url(), there.join(", "));
    }
    Ok(committed.into_iter().filter(|commit| steps.is_empty() || steps.contains(&commit.step)).collect())
}

fn remove(store: &RunStore, steps: &[u64], force: bool) -> Result<()> {
    chosen(store, steps)?;
    if !force {
        let mut others = store.committed()?.into_iter().filter(|commit| !steps.contains(&commit.step));
        let valid = others
            .try_fold(false, |found, commit| Ok::<_, anyhow::Error>(found || is_valid(store, &commit)?.is_none()))?;
        if !valid {
            bail!("{}: no valid checkpoint would be left; --force removes them all the same", store.url());
        }
    }
    for &step in steps {
        println!("step {step}: {} objects removed", store.remove(step)?.len());
    }
    Ok(())
}
