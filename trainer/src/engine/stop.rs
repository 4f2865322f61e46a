//! Stop requests: a rank never dies of a signal, it raises a flag that all ranks agree on after the current step. How long
//! they then have may be limited.

use anyhow::{Context, Result};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// Bit of a rank's step signal: it was asked to stop.
pub const STOP: u32 = 1;
/// How often the limit looks at the flag.
const LOOK: Duration = Duration::from_millis(50);

/// Raised by SIGINT, SIGTERM or SIGUSR1, or because another rank was asked to stop.
#[derive(Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Installs the handlers.
    ///
    /// # Errors
    /// When the system refuses one.
    pub fn install() -> std::io::Result<Self> {
        let flag = Self::default();
        for signal in [SIGINT, SIGTERM, SIGUSR1] {
            signal_hook::flag::register(signal, flag.0.clone())?;
        }
        Ok(flag)
    }

    /// Another rank was asked.
    pub fn raise(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether a stop was asked for.
    pub fn is_raised(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Calls `give_up` when `grace` has gone by since the flag was raised, unless what this gives is dropped before.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn limit(&self, grace: Duration, give_up: impl FnOnce() + Send + 'static) -> Result<Grace> {
        let (in_time, until_end) = channel::<()>();
        let flag = self.clone();
        let watch = move || {
            let mut asked = None;
            while until_end.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                if flag.is_raised() && asked.get_or_insert_with(Instant::now).elapsed() >= grace {
                    return give_up();
                }
            }
        };
        std::thread::Builder::new().name("grace".to_owned()).spawn(watch).context("no thread for the grace period")?;
        Ok(Grace { _in_time: in_time })
    }
}

/// A limit on the time after a stop request, as long as it lives.
pub struct Grace {
    _in_time: Sender<()>,
}
