//! `trainer status`: what a run is, from its folder alone.

use anyhow::{Context, Result, bail};
use checkpoint::{Committed, RunStore};
use configs::events::{Event, now};
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt};
use serde_json::{Value, json};
use std::time::Duration;
use url::Url;

/// The end of the log that is read; a line is a few hundred bytes.
const LOG_TAIL_BYTES: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// Options of `trainer status`.
#[derive(clap::Args)]
pub struct StatusArgs {
    /// The run folder.
    url: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Says what the run has come to.
///
/// # Errors
/// No such run, or what the store reports.
pub fn status(args: &StatusArgs) -> Result<()> {
    let here = std::env::current_dir()?;
    let url = configs::location::resolve(&here, &args.url);
    let url = url.trim_end_matches('/');
    let store = RunStore::open_existing(url)?;
    let newest = store.committed()?.into_iter().next();
    let log = end_of_log(url)?;
    if newest.is_none() && log.is_empty() {
        bail!("{}: no run is here: neither a checkpoint nor a log", store.url());
    }
    let found = Found::of(&store, newest, &log)?;
    if args.json {
        println!("{}", found.to_json(store.url()));
    } else {
        println!("{}", found.to_text(store.url()));
    }
    Ok(())
}

/// What log and checkpoints tell.
#[derive(Default)]
struct Found {
    /// The newest start, logged step, and other event.
    start: Option<Event>,
    step: Option<Event>,
    last: Option<Event>,
    /// Step, attempt, ranks and time of the newest checkpoint.
    checkpoint: Option<(u64, u32, usize, f64)>,
    /// Why the newest checkpoint cannot be read.
    damage: Option<String>,
}

impl Found {
    fn of(store: &RunStore, newest: Option<Committed>, log: &[Event]) -> Result<Found> {
        let newest_of = |is: fn(&Event) -> bool| log.iter().rev().find(|event| is(event)).cloned();
        let mut found = Found {
            start: newest_of(|event| matches!(event, Event::Start { .. })),
            step: newest_of(|event| matches!(event, Event::Step { .. })),
            last: log.last().cloned(),
            ..Found::default()
        };
        if let Some(commit) = newest {
            match store.manifest(&commit) {
                Ok(manifest) => {
                    let seconds = manifest.created_unix_ms as f64 / 1e3;
                    found.checkpoint = Some((manifest.step, manifest.attempt, manifest.world_size, seconds));
                }
                Err(error) if error.is_damage() => found.damage = Some(error.to_string()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    /// `done`, `stopped`, or `open`: under way, or ended without a word.
    fn state(&self) -> &'static str {
        match &self.last {
            Some(Event::Done { .. }) => "done",
            Some(Event::Stop { .. }) => "stopped",
            _ => "open",
        }
    }

    fn to_json(&self, url: &str) -> Value {
        let mut all = json!({
            "run": url,
            "state": self.state(),
            "last_event_time": self.last.as_ref().map(Event::time),
            "attempt": null, "world_size": null, "steps": null, "step": null, "loss": null, "images_per_s": null,
            "checkpoint": self.checkpoint.map(|(step, attempt, ranks, time)| {
                json!({"step": step, "attempt": attempt, "world_size": ranks, "time": time})
            }),
            "damage": self.damage,
        });
        if let Some(Event::Start { attempt, world_size, steps, .. }) = &self.start {
            (all["attempt"], all["world_size"], all["steps"]) = (json!(attempt), json!(world_size), json!(steps));
        }
        if let Some(Event::Step { step, loss, images_per_s, .. }) = &self.step {
            (all["step"], all["loss"], all["images_per_s"]) = (json!(step), json!(loss), json!(images_per_s));
        }
        all
    }

    fn to_text(&self, url: &str) -> String {
        let mut lines = vec![url.to_owned()];
        lines.push(match self.state() {
            "done" => "done: the last step is reached and committed".to_owned(),
            "stopped" => "stopped on request and saved; the same command goes on".to_owned(),
            _ => match &self.last {
                Some(event) => format!("not ended: its last word was {} ago", ago(event.time())),
                None => "not ended, and without a log".to_owned(),
            },
        });
        if let Some(start @ Event::Start { .. }) = &self.start {
            lines.push(format!("{start}, {} ago", ago(start.time())));
        }
        if let Some(step @ Event::Step { .. }) = &self.step {
            lines.push(format!("{step}, {} ago", ago(step.time())));
        }
        lines.push(match (&self.checkpoint, &self.damage) {
            (Some((step, attempt, ranks, time)), _) => {
                format!("checkpoint: step {step}, committed {} ago by attempt {attempt} on {ranks} rank(s)", ago(*time))
            }
            (None, Some(damage)) => format!("checkpoint: the newest cannot be read: {damage}"),
            (None, None) => "checkpoint: none yet".to_owned(),
        });
        lines.join("\n")
    }
}

fn ago(time: f64) -> String {
    let seconds = (now() - time).max(0.0) as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// The last events of `log.jsonl`; none where there is no log.
fn end_of_log(url: &str) -> Result<Vec<Event>> {
    // A local path becomes a URL by resolving it.
    let url = Url::parse(url).with_context(|| format!("{}: no URL", configs::location::redact(url)))?;
    let (store, folder) = stores::open(&url, stores::Bounds::default())?;
    let path = folder.join("log.jsonl");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tail = async {
        let size = match store.head(&path).await {
            Ok(meta) => meta.size,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        // A store may refuse an empty range.
        if size == 0 {
            return Ok(None);
        }
        let range = Some(GetRange::Bounded(size.saturating_sub(LOG_TAIL_BYTES)..size));
        store.get_opts(&path, GetOptions { range, ..GetOptions::default() }).await?.bytes().await.map(Some)
    };
    let tail = runtime.block_on(async { tokio::time::timeout(PATIENCE, tail).await });
    let place = || format!("{}: log.jsonl", configs::location::redact(url.as_str()));
    let bytes = tail.with_context(|| format!("{}: no answer within {} s", place(), PATIENCE.as_secs()))?;
    let bytes = bytes.with_context(place)?.unwrap_or_default();
    // The first and the last line may be cut.
    Ok(String::from_utf8_lossy(&bytes).lines().filter_map(Event::parse).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_done_only_if_that_was_its_last_word() {
        let of = |last| Found { last: Some(last), ..Found::default() };
        assert_eq!(of(Event::Done { step: 3, time: 0.0 }).state(), "done");
        assert_eq!(of(Event::Stop { step: 3, reason: String::new(), time: 0.0 }).state(), "stopped");
        let again = of(Event::Checkpoint { step: 4, url: String::new(), time: now() });
        assert_eq!((again.state(), Found::default().state()), ("open", "open"));
        assert!(again.to_text("u").contains("last word was 0 s ago") || again.to_text("u").contains("1 s ago"));
        assert!(again.to_text("u").ends_with("checkpoint: none yet"));
    }
}
