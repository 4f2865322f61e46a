//! Failures that all ranks learn of together, so that one of them can say it and nobody waits for the others.

use anyhow::{Context, Result};
use collective::Collective;
use serde::Serialize;
use serde::de::DeserializeOwned;

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
