//! Failures that all ranks learn of together, so that one of them can say it and nobody waits for the others.

use anyhow::{Context, Result};
use collective::Collective;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::time::Duration;

/// How long a rank waits for itself before it tells the others that it is alive: from the first to the longest.
const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];

/// A failure that all ranks have learnt of together; it begins with the rank whose it is.
#[derive(Debug, thiserror::Error)]
#[error("rank {rank}: {reason}")]
pub struct Agreed {
    /// Whose it is.
    pub rank: usize,
    /// What that rank says.
    pub reason: String,
}

/// Lets all ranks learn whether each of them succeeded; the first failure becomes the error of all. All ranks call it
/// together. A lone rank keeps its error as it is.
///
/// # Errors
/// [`Agreed`], or what the collective reports.
pub fn agree<T>(collective: &dyn Collective, mine: Result<T>) -> Result<T> {
    if collective.world_size() == 1 {
        return mine;
    }
    let message = mine.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    let all = collective.gather_bytes(message.as_bytes()).context("agreeing with the other ranks")?;
    match all.iter().position(|message| !message.is_empty()) {
        None => mine,
        Some(rank) => Err(Agreed { rank, reason: String::from_utf8_lossy(&all[rank]).into_owned() }.into()),
    }
}

/// Lets rank 0 decide something for all. All ranks call it together.
///
/// # Errors
/// Rank 0's, as [`agree`].
pub fn decided_by_rank_0<T>(collective: &dyn Collective, decide: impl FnOnce() -> Result<T>) -> Result<T>
where
    T: Serialize + DeserializeOwned,
{
    let decided = match collective.rank() {
        0 => decide().map(Some),
        _ => Ok(None),
    };
    let decision = agree(collective, decided)?;
    let message = decision.as_ref().map(serde_json::to_vec).transpose()?.unwrap_or_default();
    let all = collective.gather_bytes(&message)?;
    serde_json::from_slice(&all[0]).context("rank 0's decision about the start")
}

/// Waits until every rank is ready, however long that takes: they tell each other again and again that they are alive, so
/// that only a rank that is gone or hangs is waited for in vain. `wait` waits for this rank, at most so long, and says
/// whether it is ready. All ranks call it together.
///
/// # Errors
/// What the collective reports.
pub fn wait_together(collective: &dyn Collective, mut wait: impl FnMut(Duration) -> bool) -> Result<()> {
    let [mut pause, longest] = PAUSES;
    loop {
        let ready = collective.gather_values(vec![u8::from(wait(pause))]).context("waiting for the other ranks")?;
        if ready.iter().all(|&ready| ready != 0) {
            return Ok(());
        }
        pause = (2 * pause).min(longest);
    }
}

/// Does `work`, however long it takes, while another thread waits with the other ranks as [`wait_together`] does. All ranks call
/// it together; `work` starts nothing on the collective.
///
/// # Errors
/// As [`agree`], and as [`wait_together`].
pub fn work_together<T>(collective: &dyn Collective, work: impl FnOnce() -> T) -> Result<T> {
    let (done, until_done) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let ready = move |pause| until_done.recv_timeout(pause) != Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        let waiting = scope.spawn(move || wait_together(collective, ready));
        let result = work();
        drop(done);
        let waited = waiting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        waited.map(|()| result)
    })
}
