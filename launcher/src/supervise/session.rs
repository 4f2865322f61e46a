//! The processes of a session: all that an engine has started, wherever mpirun has put it.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Kills every process of the session.
pub fn kill_all(session: Pid) {
    // Again until nothing is left, because a process may be forking; bounded, because a process in the kernel's
    // uninterruptible sleep dies only when that ends.
    for _ in 0..20 {
        let members = members(session);
        if members.is_empty() {
            return;
        }
        for pid in members {
            // It may have ended by itself: fine.
            let _ = kill(pid, Signal::SIGKILL);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Live processes of a session, from /proc.
pub fn members(session: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).ok().and_then(|stat| live_session(&stat))
            == Some(session.as_raw())
    })
    .map(Pid::from_raw)
    .collect()
}

/// The session of a process that is not a zombie, from the text of /proc/PID/stat: `pid (name) state ppid pgrp session …`.
fn live_session(stat: &str) -> Option<i32> {
    // The name may hold anything, parentheses and spaces too.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let session = fields.nth(2)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(session)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_read_past_any_process_name() {
        assert_eq!(live_session("12 (a) b) S 1 12 77 0 -1"), Some(77));
        assert_eq!(live_session("12 (mpirun) Z 1 12 77 0 -1"), None);
        assert_eq!(live_session(""), None);
    }
}
