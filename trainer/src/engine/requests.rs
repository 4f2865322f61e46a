//! Rank 0's look-out for requests for a checkpoint (`trainer checkpoints RUN request`), beside the step loop.

use anyhow::{Context, Result};
use checkpoint::RunStore;
use std::collections::BTreeSet;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Between two looks at a local run folder; remote stores charge for them.
const LOCAL_PAUSE: Duration = Duration::from_secs(1);
const REMOTE_PAUSE: Duration = Duration::from_secs(10);

/// The requests that were seen and not yet taken.
pub struct Requests {
    open: Arc<Mutex<Vec<String>>>,
    /// Ends the thread when it is dropped; nobody waits for it, since it may be asking the store.
    _end: Sender<()>,
}

fn lock(open: &Mutex<Vec<String>>) -> MutexGuard<'_, Vec<String>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Requests {
    /// Looks out for requests in a run folder.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn watch(store: RunStore) -> Result<Self> {
        let open = Arc::new(Mutex::new(Vec::new()));
        let (end, until_end) = channel();
        let pause = if store.url().starts_with("file:") { LOCAL_PAUSE } else { REMOTE_PAUSE };
        let found = open.clone();
        let watch = move || {
            let (mut known, mut is_failing) = (BTreeSet::new(), false);
            loop {
                match store.requests() {
                    Ok(requests) => {
                        let new = requests.iter().filter(|key| !known.contains(*key)).cloned();
                        lock(&found).extend(new);
                        // What was answered is forgotten: its name may come again.
                        known = requests.into_iter().collect();
                        is_failing = false;
                    }
                    Err(error) if !is_failing => {
                        eprintln!("trainer: warning: requests for a checkpoint cannot be seen: {error}");
                        is_failing = true;
                    }
                    Err(_) => {}
                }
                if until_end.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
            }
        };
        std::thread::Builder::new().name("requests".to_owned()).spawn(watch).context("no thread for requests")?;
        Ok(Self { open, _end: end })
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        !lock(&self.open).is_empty()
    }

    /// Takes them all, to be answered.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *lock(&self.open))
    }
}
