use crate::Place;
use std::borrow::Cow;
use std::time::Duration;

/// What can go wrong in a collective operation.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// The buffers of an operation do not fit together.
    #[error("rank {rank}: {op}: {found}; expected {expected}")]
    Size {
        /// Who called.
        rank: usize,
        /// The operation.
        op: &'static str,
        /// What the call had.
        found: String,
        /// What it should have had.
        expected: String,
    },
    /// The backend cannot reach the memory of an operation.
    #[error("rank {rank}: {op} on {found}, which the {backend} backend cannot reach")]
    Place {
        /// Who called.
        rank: usize,
        /// The operation.
        op: &'static str,
        /// The backend.
        backend: &'static str,
        /// Where the buffers are.
        found: Place,
    },
    /// Not all ranks took part in time. The buffers stay with the operation; the run cannot go on.
    #[error(
        "rank {rank}: {op} did not complete within {deadline:?} ({phase}): a rank is stuck, dead or slower than \
         `collective.timeout_s` allows; look for the last message of every rank"
    )]
    Deadline {
        /// Who waited.
        rank: usize,
        /// The operation.
        op: &'static str,
        /// How far it had come, and which rank is missing where that is known.
        phase: Cow<'static, str>,
        /// How long it waited.
        deadline: Duration,
    },
    /// The backend failed.
    #[error("rank {rank}: {op} failed: {reason}")]
    Backend {
        /// Who called.
        rank: usize,
        /// The operation.
        op: &'static str,
        /// What the backend said.
        reason: String,
    },
    /// The backend could not be initialised.
    #[error("{backend} cannot be initialised: {reason}")]
    Init {
        /// The backend.
        backend: &'static str,
        /// What it said.
        reason: String,
    },
    /// A region was taken back as another element type than it holds.
    #[error("a region of {found} was read as {expected}")]
    ElementType {
        /// What it holds.
        found: &'static str,
        /// What was asked for.
        expected: &'static str,
    },
}
