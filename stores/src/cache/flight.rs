//! Who fetches a block: one at a time in a process, and the others get its bytes.

use super::block::BlockKey;
use bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

#[derive(Debug, Default)]
pub(super) struct Flights(Arc<Mutex<HashMap<BlockKey, watch::Receiver<Option<Bytes>>>>>);

pub(crate) enum Claim {
    Ours(Ticket),
    /// Closes without a value if its fetcher fails.
    Theirs(watch::Receiver<Option<Bytes>>),
}

/// The right and the duty to fetch a block. Dropped unfulfilled, it is anybody's.
pub(crate) struct Ticket {
    key: BlockKey,
    flights: Flights,
    answer: watch::Sender<Option<Bytes>>,
}

impl Flights {
    pub fn claim(&self, key: BlockKey) -> Claim {
        let mut flights = self.lock();
        if let Some(answer) = flights.get(&key) {
            return Claim::Theirs(answer.clone());
        }
        let (answer, receiver) = watch::channel(None);
        flights.insert(key, receiver);
        Claim::Ours(Ticket { key, flights: Self(self.0.clone()), answer })
    }

    /// A map that is valid between statements.
    fn lock(&self) -> MutexGuard<'_, HashMap<BlockKey, watch::Receiver<Option<Bytes>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    pub fn fulfil(self, block: Bytes) {
        self.answer.send_replace(Some(block));
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
    }
}
