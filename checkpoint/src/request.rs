//! Requests for a checkpoint: objects below `requests/` of the run folder, which a run looks for while it trains and
//! removes when a later checkpoint is committed.

use crate::{
    attempt::random_u64, backend::Landed, error::CheckpointError, keys, runtime, sealed::unix_ms, store::RunStore,
};
use serde_json::json;

impl RunStore {
    /// Asks whoever trains this run for a checkpoint and gives the request's key.
    ///
    /// # Errors
    /// Store errors.
    pub fn request(&self) -> Result<String, CheckpointError> {
        let key = keys::request(random_u64());
        let content = format!("{}\n", json!({"ask": "checkpoint", "created_unix_ms": unix_ms()}));
        match runtime::wait(self.backend.create_small(&key, content.as_bytes()))? {
            Landed::Ours => Ok(key),
            Landed::Theirs => Err(self.backend.damaged(&key, "another process has made the same random name")),
        }
    }

    /// The requests that are there, whoever made them and whatever they are called.
    ///
    /// # Errors
    /// Store errors.
    pub fn requests(&self) -> Result<Vec<String>, CheckpointError> {
        runtime::wait(self.backend.list(keys::REQUESTS))
    }

    /// Removes requests, as a committed checkpoint has answered them.
    ///
    /// # Errors
    /// Store errors.
    pub fn answer(&self, requests: &[String]) -> Result<(), CheckpointError> {
        if requests.is_empty() { Ok(()) } else { runtime::wait(self.backend.delete(requests)) }
    }
}
