//! Checkpoints while the run goes on: the step loop pays for a copy, a thread of each rank uploads, and when all ranks
//! have uploaded, rank 0 commits.

use super::snapshot::Snapshot;
use super::stepper::Stepper;
use anyhow::{Context, Result, anyhow};
use checkpoint::{Commit, Manifest, Retention, RunStore, ShardId, ShardRecord};
use collective::Collective;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

/// Bit of a rank's step signal: its shard of the checkpoint under way is uploaded (or has failed to).
pub const UPLOADED: u32 = 2;
/// Bit of a rank's step signal: a commit failed on rank 0.
pub const COMMIT_FAILED: u32 = 4;

/// Saves checkpoints of one run. All ranks make the same calls after the same steps.
pub struct Saver {
    collective: Arc<dyn Collective>,
    attempt: u32,
    /// Step of the newest checkpoint that was begun.
    step: u64,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    state: State,
}

enum State {
    Idle,
    Uploading {
        step: u64,
        optimizer_step: u64,
        metrics: BTreeMap<String, f64>,
        result: Receiver<Result<ShardRecord>>,
        done: Option<Result<ShardRecord>>,
    },
    /// Rank 0 waits for its commit; for the other ranks the checkpoint is over.
    Committing {
        step: u64,
        result: Receiver<Result<Manifest>>,
        done: Option<Result<Manifest>>,
    },
}

enum Job {
    Upload { id: ShardId, snapshot: Snapshot, result: Sender<Result<ShardRecord>> },
    Commit { commit: Commit, result: Sender<Result<Manifest>> },
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

impl Saver {
    /// A saver of `attempt` that keeps the checkpoints of `retention`.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(collective: Arc<dyn Collective>, store: RunStore, attempt: u32, retention: Retention) -> Result<Self> {
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new().name("checkpoint".to_owned());
        let thread = thread.spawn(move || work(&store, &retention, queue)).context("no thread for checkpoints")?;
        Ok(Self { collective, attempt, step: 0, jobs: Some(jobs), thread: Some(thread), state: State::Idle })
    }

    /// This rank's part of the next step's signal.
    pub fn signal(&mut self) -> u32 {
        match &mut self.state {
            State::Idle => 0,
            State::Uploading { result, done, .. } => {
                poll(result, done);
                if done.is_some() { UPLOADED } else { 0 }
            }
            State::Committing { result, done, .. } => {
                poll(result, done);
                if matches!(done, Some(Err(_))) { COMMIT_FAILED } else { 0 }
            }
        }
    }

    /// Acts on what all ranks signalled in a step; gives the checkpoint that has been committed meanwhile (on rank 0).
    ///
    /// # Errors
    /// What made any rank's upload or the commit fail, on every rank.
    pub fn advance(&mut self, signals: &[u32], config: &Value) -> Result<Option<Saved>> {
        if signals.iter().any(|signal| signal & COMMIT_FAILED != 0) {
            return self.finish(config);
        }
        if matches!(self.state, State::Uploading { .. }) && signals.iter().all(|signal| signal & UPLOADED != 0) {
            self.collect(config)?;
        }
        if let State::Committing { step, done: Some(Ok(manifest)), .. } = &self.state {
            let saved = Saved { step: *step, key: manifest.key() };
            self.state = State::Idle;
            return Ok(Some(saved));
        }
        Ok(None)
    }

    /// Starts a checkpoint of `step`, of whose weights `metrics` were measured: copies this rank's shards and returns. A checkpoint still under way is finished
    /// first, so that no more than one copy is ever held.
    ///
    /// # Errors
    /// As [`Saver::finish`].
    pub fn save(
        &mut self,
        step: u64,
        stepper: &Stepper,
        mut metrics: BTreeMap<String, f64>,
        config: &Value,
    ) -> Result<Option<Saved>> {
        let earlier = self.finish(config)?;
        let snapshot = Snapshot::of(&stepper.buckets, &stepper.optimizer.averages)?;
        let (rank, world_size) = (self.collective.rank(), self.collective.world_size());
        let (sender, result) = channel();
        let id = ShardId { attempt: self.attempt, step, rank, world_size };
        self.submit(Job::Upload { id, snapshot, result: sender })?;
        let optimizer_step = stepper.optimizer.updates;
        // Weights whose loss overflows are no candidates for the best.
        metrics.retain(|_, value| value.is_finite());
        (self.step, self.state) = (step, State::Uploading { step, optimizer_step, metrics, result, done: None });
        Ok(earlier)
    }

    /// Waits until the checkpoint under way is committed, on every rank; gives it on rank 0.
    ///
    /// # Errors
    /// What made any rank's upload or the commit fail, on every rank.
    pub fn finish(&mut self, config: &Value) -> Result<Option<Saved>> {
        if let State::Uploading { result, done, .. } = &mut self.state {
            wait(result, done);
            self.collect(config)?;
        }
        let mut saved = None;
        let mut outcome = String::new();
        if let State::Committing { step, mut result, mut done } = std::mem::replace(&mut self.state, State::Idle) {
            wait(&mut result, &mut done);
            match done {
                Some(Ok(manifest)) => saved = Some(Saved { step, key: manifest.key() }),
                Some(Err(error)) => outcome = format!("{error:#}"),
                None => outcome = "the checkpoint thread ended".to_owned(),
            }
        }
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
    fn collect(&mut self, config: &Value) -> Result<()> {
        let State::Uploading { step, optimizer_step, metrics, done, .. } =
            std::mem::replace(&mut self.state, State::Idle)
        else {
            return Ok(());
        };
        // A message is the record as JSON, or "!" and why there is none.
        let message = match done {
            Some(Ok(record)) => serde_json::to_vec(&record)?,
            Some(Err(error)) => format!("!{error:#}").into_bytes(),
            None => b"!the checkpoint thread ended".to_vec(),
        };
        let mut shards = Vec::new();
        for (rank, message) in self.collective.gather_bytes(&message)?.into_iter().enumerate() {
            if let Some(reason) = message.strip_prefix(b"!") {
                let reason = String::from_utf8_lossy(reason).into_owned();
                return Err(SaveFailed { rank, step, reason }.into());
            }
            shards.push(serde_json::from_slice::<ShardRecord>(&message).context("a shard record of another rank")?);
        }
        if self.collective.rank() == 0 {
            let (sender, result) = channel();
            let commit = Commit {
                attempt: self.attempt,
                step,
                optimizer_step,
                config: config.clone(),
                decision_log: Value::Array(Vec::new()),
                metrics,
                shards,
            };
            self.submit(Job::Commit { commit, result: sender })?;
            self.state = State::Committing { step, result, done: None };
        }
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

fn poll<T>(result: &mut Receiver<Result<T>>, done: &mut Option<Result<T>>) {
    if done.is_none() {
        *done = match result.try_recv() {
            Ok(value) => Some(value),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(anyhow!("the checkpoint thread ended"))),
        };
    }
}

fn wait<T>(result: &mut Receiver<Result<T>>, done: &mut Option<Result<T>>) {
    if done.is_none() {
        // Store operations are bounded in time, so this is too.
        *done = result.recv().ok();
    }
}

fn work(store: &RunStore, retention: &Retention, queue: Receiver<Job>) {
    for job in queue {
        // A receiver that is gone belongs to a run that has already failed.
        match job {
            Job::Upload { id, snapshot, result } => {
                let _ = result.send(store.write_shard(&id, &snapshot.slices()).map_err(Into::into));
            }
            Job::Commit { commit, result } => {
                let _ = result.send(store.commit(commit).map_err(Into::into));
                if let Err(error) = store.retain(retention) {
                    eprintln!("trainer: warning: old checkpoints were not removed: {error}");
                }
            }
        }
    }
}
