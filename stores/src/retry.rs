//! Trying again: what a read may take, and how it fails.

use crate::redact_text;
use object_store::Error;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// How an object is read.
#[derive(Debug, Clone, Copy)]
pub struct ReadOptions {
    /// Longest time for one try of a small request. Default 20 s.
    pub try_timeout: Duration,
    /// A try of a large request gets its bytes at this rate on top. Default 1 MiB/s.
    pub min_bytes_per_s: u64,
    /// Longest silence in the middle of a body. Default 10 s.
    pub silence: Duration,
    /// Tries in all, at least 1; each may hold several of the store's client. Default 6.
    pub tries: u32,
    /// Pause before the second try, threefold from try to try. Default 100 ms.
    pub pause: Duration,
    /// Ranges at most so far apart are read as one. Default 1 MiB.
    pub gap_bytes: u64,
    /// Longest range of one request; longer ones are read as several at a time. Default 8 MiB.
    pub request_bytes: u64,
    /// Requests in flight. Default 16.
    pub requests_at_once: usize,
}

impl Default for ReadOptions {
    fn default() -> Self {
        Self {
            try_timeout: Duration::from_secs(20),
            min_bytes_per_s: 1 << 20,
            silence: Duration::from_secs(10),
            tries: 6,
            pause: Duration::from_millis(100),
            gap_bytes: 1 << 20,
            request_bytes: 8 << 20,
            requests_at_once: 16,
        }
    }
}

/// An object that could not be read. Shows no secrets.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// There is no such object (any more).
    #[error("{object}: {operation}: there is no such object")]
    Missing {
        /// The redacted URL.
        object: String,
        /// What was to be done.
        operation: String,
    },
    /// The object is another one than when it was opened.
    #[error(
        "{object}: it was changed while it was in use: {what}; a data set must not change under a run: put it back, or start a new run on the new one"
    )]
    Changed {
        /// The redacted URL.
        object: String,
        /// What tells so.
        what: String,
    },
    /// The store refused, or failed every time.
    #[error("{object}: {operation}: failed after {tries} of at most {most_tries} tries: {reason}")]
    Failed {
        /// The redacted URL.
        object: String,
        /// What was to be done, with the range.
        operation: String,
        /// Tries that were made.
        tries: u32,
        /// Tries that would have been made, had the reason looked as if it may pass.
        most_tries: u32,
        /// The last failure.
        reason: String,
    },
}

/// A try that failed.
pub(crate) enum Trouble {
    /// Trying again cannot help.
    Final(ReadError),
    Missing,
    Refused(String),
    /// This may pass.
    Passing(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        match &error {
            Error::NotFound { .. } => Trouble::Missing,
            Error::NotSupported { .. }
            | Error::NotImplemented { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::InvalidPath { .. }
            | Error::UnknownConfigurationKey { .. } => Trouble::Refused(error.to_string()),
            _ => Trouble::Passing(error.to_string()),
        }
    }
}

impl ReadOptions {
    /// Does `work` until it succeeds or fails for good. `bytes` are what one try transfers.
    pub(crate) async fn tried<T, W: Future<Output = Result<T, Trouble>>>(
        &self,
        object: &str,
        operation: impl Fn() -> String,
        bytes: u64,
        work: impl Fn() -> W,
    ) -> Result<T, ReadError> {
        let allowed = self.try_timeout + Duration::from_secs(bytes / self.min_bytes_per_s.max(1));
        let failed = |tries, reason: &str| ReadError::Failed {
            object: redact_text(object),
            operation: operation(),
            tries,
            most_tries: self.tries.max(1),
            reason: redact_text(reason),
        };
        let mut tries = 1;
        loop {
            let reason = match tokio::time::timeout(allowed, work()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(Trouble::Final(error))) => return Err(error),
                Ok(Err(Trouble::Missing)) => {
                    return Err(ReadError::Missing { object: redact_text(object), operation: operation() });
                }
                Ok(Err(Trouble::Refused(reason))) => return Err(failed(tries, &reason)),
                Ok(Err(Trouble::Passing(reason))) => reason,
                Err(_) => format!("no complete answer within {:.1} s", allowed.as_secs_f64()),
            };
            if tries >= self.tries {
                return Err(failed(tries, &reason));
            }
            tokio::time::sleep(self.pause_before(tries)).await;
            tries += 1;
        }
    }

    /// Between half and all of the nominal pause, so that ranks that failed together do not come back together.
    fn pause_before(&self, tries: u32) -> Duration {
        let nominal = self.pause * 3u32.saturating_pow(tries - 1);
        let share = RandomState::new().hash_one(tries) as f64 / u64::MAX as f64;
        nominal.mul_f64(0.5 + 0.5 * share)
    }
}
