//! Failures that all ranks learn of together, so that one of them can say it and nobody waits for the others.

use anyhow::{Context, Result};
use collective::Collective;

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
