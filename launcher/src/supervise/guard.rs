//! The guard: a second process of this program that outlives a launcher which was killed, and ends its engine.
//!
//! The kernel tells only the engine's main process that the launcher has died, and mpirun, told so, sometimes ends
//! without ending its ranks (seen with OpenMPI 4.1.4 in one of three attempts). The guard waits at a pipe whose other
//! end the launcher holds: when the pipe ends and the launcher has not said that all is well, the session is ended.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use nix::unistd::{Pid, setsid};

use super::session;

/// First argument that makes this program a guard.
const ARGUMENT: &str = "--guard-session";
/// What the launcher writes when nothing is left to guard.
const RELEASE: &str = "released";
/// How long a session whose launcher is gone may take to end by itself.
const GRACE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(100);

/// The launcher's hold on its guard.
pub struct Guard {
    child: Child,
    pipe: ChildStdin,
}

impl Guard {
    /// Starts a guard that knows no session yet.
    pub fn start() -> anyhow::Result<Guard> {
        let mut process = Command::new(std::env::current_exe().context("cannot find the launcher's own executable")?);
        process.arg(ARGUMENT).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only setsid is called, which is async-signal-safe and allocates nothing.
        unsafe {
            // Out of reach of what a terminal or a shell sends to the launcher's process group.
            process.pre_exec(|| Ok(setsid().map(drop)?));
        }
        let mut child = process.spawn().context("cannot start the guard process")?;
        let pipe = child.stdin.take().ok_or_else(|| anyhow!("the guard process has no stdin"))?;
        Ok(Guard { child, pipe })
    }

    /// Names the session to end if this process dies.
    pub fn watch(&mut self, session: Pid) -> anyhow::Result<()> {
        writeln!(self.pipe, "{session}").context("cannot tell the guard process its session")
    }

    /// Nothing is left to guard.
    pub fn release(mut self) {
        // A guard that is gone needs no release.
        let _ = writeln!(self.pipe, "{RELEASE}");
        drop(self.pipe);
        let _ = self.child.wait();
    }
}

/// Runs as a guard if this process was started as one; returns at once (false) otherwise.
pub fn run_if_asked() -> bool {
    if std::env::args().nth(1).as_deref() != Some(ARGUMENT) {
        return false;
    }
    let mut text = String::new();
    // Ends when the launcher closes the pipe or dies. Whatever was read before an error counts.
    let _ = std::io::stdin().read_to_string(&mut text);
    if let Some(session) = orphan(&text) {
        end(session);
    }
    true
}

/// The session that the launcher left behind, from what it wrote.
fn orphan(text: &str) -> Option<Pid> {
    let mut lines = text.lines();
    let session = lines.next()?.parse().ok()?;
    (lines.next() != Some(RELEASE)).then(|| Pid::from_raw(session))
}

/// The main process has been told by the kernel: as long as it lives, it may end the others in good order.
fn end(session: Pid) {
    let until = Instant::now() + GRACE;
    while session::members(session).contains(&session) && Instant::now() < until {
        std::thread::sleep(POLL);
    }
    session::kill_all(session);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_session_that_was_named_and_not_released_is_an_orphan() {
        assert_eq!(orphan("12\n"), Some(Pid::from_raw(12)));
        assert_eq!(orphan("12\nreleased\n"), None);
        assert_eq!(orphan("released\n"), None);
        assert_eq!(orphan(""), None);
    }
}
