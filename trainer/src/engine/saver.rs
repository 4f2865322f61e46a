//! Checkpoints while the run goes on: the step loop pays for a copy, a thread of each rank uploads, and when all ranks
//! have uploaded, rank 0 commits.

use super::agree::wait_together;
use super::snapshot::Snapshot;
use super::stepper::Stepper;
use super::stop::StopFlag;
use anyhow::{Context, Result, anyhow};
use checkpoint::{Commit, Manifest, Retention, RunStore, ShardId, ShardRecord};
use collective::Collective;
use configs::phases::Phase;
use configs::spans::{Track, phase, span};
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bit of a rank's step signal: its shard of the checkpoint under way is uploaded (or has failed to).
pub const UPLOADED: u32 = 2;
/// Bit of rank 0's step signal: it has committed the checkpoint, or has failed to.
pub const COMMIT_ENDED: u32 = 4;

/// How a run saves.
pub struct SaveOptions {
    /// Number of this start of the run.
    pub attempt: u32,
    /// What is kept.
    pub retention: Retention,
    /// Longest time for a rank's upload, and for the store to let go of its memory.
    pub upload_timeout: Duration,
    /// When a stop is asked for, nobody waits for old checkpoints to be removed.
    pub stop: StopFlag,
}

/// Saves checkpoints of one run. All ranks make the same calls after the same steps.
pub struct Saver {
    collective: Arc<dyn Collective>,
    attempt: u32,
    upload_timeout: Duration,
    snapshot: Snapshot,
    /// Step of the newest checkpoint that was begun.
    step: u64,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    state: State,
}

/// The same on all ranks, whatever their threads have come to.
enum State {
    Idle,
    Uploading {
        to_commit: Commit,
        requests: Vec<String>,
        shard: Awaited<ShardRecord>,
    },
    /// Rank 0 awaits its commit, the others what it says of it.
    Committing {
        manifest: Option<Awaited<Manifest>>,
    },
}

enum Job {
    Upload { id: ShardId, snapshot: Snapshot, result: Sender<Result<ShardRecord>> },
    Commit { commit: Commit, requests: Vec<String>, result: Sender<Result<Manifest>> },
}

/// A checkpoint that failed on some rank; all ranks have agreed on it.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank}: step {step}, phase checkpoint: {reason}")]
pub struct SaveFailed {
    rank: usize,
    step: u64,
    reason: String,
}

/// A checkpoint that was committed, as rank 0 learns it.
pub struct Saved {
    /// Its step.
    pub step: u64,
    /// Its manifest's key in the run folder.
    pub key: String,
}

/// What to save.
pub struct Save<'a> {
    /// Steps made.
    pub step: u64,
    /// The weights and what goes with them.
    pub stepper: &'a Stepper,
    /// What was measured of the weights.
    pub metrics: BTreeMap<String, f64>,
    /// Whether whoever resumes has to measure them first.
    pub put_off: bool,
    /// Config and recipe, for the manifest.
    pub record: &'a Value,
    /// Requests that the commit answers; of rank 0.
    pub requests: Vec<String>,
}

impl Saver {
    /// A saver of the shards of `stepper`, for which it makes room.
    ///
    /// # Errors
    /// When there is not enough memory or no thread can be started.
    pub fn start(
        collective: Arc<dyn Collective>,
        store: RunStore,
        stepper: &Stepper,
        options: SaveOptions,
    ) -> Result<Self> {
        let SaveOptions { attempt, retention, upload_timeout, stop } = options;
        let snapshot = Snapshot::allocate(&stepper.buckets, &stepper.optimizer.averages)?;
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let thread =
            thread.spawn(move || work(&store, &retention, &stop, queue)).context("no thread for checkpoints")?;
        let (jobs, thread) = (Some(jobs), Some(thread));
        Ok(Self { collective, attempt, upload_timeout, snapshot, step: 0, jobs, thread, state: State::Idle })
    }

    /// Step of the checkpoint that is on its way; the same on all ranks.
    pub fn under_way(&self) -> Option<u64> {
        (!matches!(self.state, State::Idle)).then_some(self.step)
    }

    /// This rank's part of the next step's signal.
    pub fn signal(&mut self) -> u32 {
        match &mut self.state {
            State::Uploading { shard, .. } => u32::from(shard.is_done(Duration::ZERO)) * UPLOADED,
            State::Committing { manifest: Some(manifest) } => {
                u32::from(manifest.is_done(Duration::ZERO)) * COMMIT_ENDED
            }
            State::Idle | State::Committing { manifest: None } => 0,
        }
    }

    /// Acts on what all ranks signalled in a step; gives the checkpoint that has been committed meanwhile (on rank 0).
    ///
    /// # Errors
    /// What made any rank's upload or the commit fail, on every rank.
    pub fn advance(&mut self, signals: &[u32]) -> Result<Option<Saved>> {
        if signals.iter().any(|signal| signal & COMMIT_ENDED != 0) {
            return self.finish();
        }
        if matches!(self.state, State::Uploading { .. }) && signals.iter().all(|signal| signal & UPLOADED != 0) {
            self.collect()?;
        }
        Ok(None)
    }

    /// Starts a checkpoint: copies this rank's shards and returns. A checkpoint still under way is finished first, so that
    /// no more than one copy is ever held.
    ///
    /// # Errors
    /// As [`Saver::finish`].
    pub fn save(&mut self, save: Save) -> Result<Option<Saved>> {
        let earlier = self.finish()?;
        let Save { step, stepper, mut metrics, put_off, record, requests } = save;
        let _copying = phase(Phase::Checkpoint, "snapshot", step);
        self.snapshot.take(&stepper.buckets, Instant::now() + self.upload_timeout)?;
        let (rank, world_size) = (self.collective.rank(), self.collective.world_size());
        let (result, shard) = Awaited::new();
        let id = ShardId { attempt: self.attempt, step, rank, world_size };
        self.submit(Job::Upload { id, snapshot: self.snapshot.clone(), result })?;
        // Weights whose loss overflows are no candidates for the best.
        metrics.retain(|_, value| value.is_finite());
        let to_commit = Commit {
            attempt: self.attempt,
            step,
            optimizer_step: stepper.optimizer.updates,
            config: record.clone(),
            decision_log: stepper.decisions.to_json(),
            recent_losses: stepper.guard.losses(),
            metrics,
            put_off,
            shards: Vec::new(),
        };
        (self.step, self.state) = (step, State::Uploading { to_commit, requests, shard });
        Ok(earlier)
    }

    /// Waits until the checkpoint under way is committed, on every rank; gives it on rank 0.
    ///
    /// # Errors
    /// What made any rank's upload or the commit fail, on every rank.
    pub fn finish(&mut self) -> Result<Option<Saved>> {
        if self.under_way().is_none() {
            return Ok(None);
        }
        let _waiting = phase(Phase::Checkpoint, "wait for the checkpoint", self.step);
        if let State::Uploading { shard, .. } = &mut self.state {
            wait_together(&*self.collective, |pause| shard.is_done(pause))?;
            self.collect()?;
        }
        let State::Committing { manifest } = &mut self.state else { return Ok(None) };
        wait_together(&*self.collective, |pause| manifest.as_mut().is_none_or(|manifest| manifest.is_done(pause)))?;
        let done = manifest.take().map(Awaited::take);
        self.state = State::Idle;
        let (saved, outcome) = match done {
            Some(Ok(manifest)) => (Some(Saved { step: self.step, key: manifest.key() }), String::new()),
            Some(Err(error)) => (None, format!("{error:#}")),
            None => (None, String::new()),
        };
        let outcomes = self.collective.gather_bytes(outcome.as_bytes()).context("agreeing on a checkpoint")?;
        match outcomes.first() {
            Some(failure) if !failure.is_empty() => {
                let reason = format!("it could not be committed: {}", String::from_utf8_lossy(failure));
                Err(SaveFailed { rank: 0, step: self.step, reason }.into())
            }
            _ => Ok(saved),
        }
    }

    /// Gathers all ranks' shard records; rank 0 goes on to commit.
    fn collect(&mut self) -> Result<()> {
        let State::Uploading { to_commit, requests, shard } = std::mem::replace(&mut self.state, State::Idle) else {
            return Ok(());
        };
        // A message is the record as JSON, or "!" and why there is none.
        let message = match shard.take() {
            Ok(record) => serde_json::to_vec(&record)?,
            Err(error) => format!("!{error:#}").into_bytes(),
        };
        let mut shards = Vec::new();
        for (rank, message) in self.collective.gather_bytes(&message)?.into_iter().enumerate() {
            if let Some(reason) = message.strip_prefix(b"!") {
                let reason = String::from_utf8_lossy(reason).into_owned();
                return Err(SaveFailed { rank, step: self.step, reason }.into());
            }
            shards.push(serde_json::from_slice::<ShardRecord>(&message).context("a shard record of another rank")?);
        }
        let mut manifest = None;
        if self.collective.rank() == 0 {
            let (result, awaited) = Awaited::new();
            self.submit(Job::Commit { commit: Commit { shards, ..to_commit }, requests, result })?;
            manifest = Some(awaited);
        }
        self.state = State::Committing { manifest };
        Ok(())
    }

    fn submit(&self, job: Job) -> Result<()> {
        let jobs = self.jobs.as_ref().ok_or_else(|| anyhow!("the saver was stopped"))?;
        jobs.send(job).map_err(|_| anyhow!("the checkpoint thread ended"))
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A result that the checkpoint thread owes.
struct Awaited<T> {
    result: Receiver<Result<T>>,
    done: Option<Result<T>>,
}

impl<T> Awaited<T> {
    fn new() -> (Sender<Result<T>>, Self) {
        let (sender, result) = channel();
        (sender, Self { result, done: None })
    }

    /// Whether it has come, within `wait`; also if it never will.
    fn is_done(&mut self, wait: Duration) -> bool {
        use std::sync::mpsc::RecvTimeoutError::{Disconnected, Timeout};
        if self.done.is_none() {
            self.done = match self.result.recv_timeout(wait) {
                Ok(value) => Some(value),
                Err(Timeout) => None,
                Err(Disconnected) => Some(Err(anyhow!("the checkpoint thread ended"))),
            };
        }
        self.done.is_some()
    }

    fn take(self) -> Result<T> {
        self.done.unwrap_or_else(|| Err(anyhow!("the checkpoint thread has not finished")))
    }
}

fn work(store: &RunStore, retention: &Retention, stop: &StopFlag, queue: Receiver<Job>) {
    for job in queue {
        // A receiver that is gone belongs to a run that has already failed.
        match job {
            Job::Upload { id, snapshot, result } => {
                let shard = {
                    let _uploading = span(Track::Saver, "upload", id.step);
                    store.write_shard(&id, &snapshot.slices()).map_err(Into::into)
                };
                // The next checkpoint needs its memory.
                drop(snapshot);
                let _ = result.send(shard);
            }
            Job::Commit { commit, requests, result } => {
                let manifest = {
                    let _committing = span(Track::Saver, "commit", commit.step);
                    store.commit(commit)
                };
                let is_committed = manifest.is_ok();
                let _ = result.send(manifest.map_err(Into::into));
                if is_committed && let Err(error) = store.answer(&requests) {
                    eprintln!("trainer: warning: requests for a checkpoint were not removed: {error}");
                }
                if !stop.is_raised()
                    && let Err(error) = store.retain(retention)
                {
                    eprintln!("trainer: warning: old checkpoints were not removed: {error}");
                }
            }
        }
    }
}
