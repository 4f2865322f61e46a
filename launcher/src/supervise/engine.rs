//! The engine's process: started in a session of its own, tied to the life of the launcher, ended as a whole.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::SyncSender;

use anyhow::{Context, anyhow};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, getpid, getppid, setsid};

use super::Report;
use super::demux::Demux;
use super::faults::Ended;
use crate::cluster::EngineCommand;

/// A running engine.
pub struct Engine {
    child: Child,
    session: Pid,
}

impl Engine {
    /// Starts the engine; its lines, the ends of its two streams and its own end come as reports.
    ///
    /// In a session of its own, so that a Ctrl-C at the terminal reaches the launcher alone. The kernel ends it when
    /// the *thread* that started it ends: call this from the main thread.
    pub fn start(command: &EngineCommand, reports: &SyncSender<Report>) -> anyhow::Result<Engine> {
        let (program, arguments) = command
            .argv
            .split_first()
            .ok_or_else(|| anyhow!("the engine's command is empty"))?;
        let launcher = getpid();
        let mut process = Command::new(program);
        process.args(arguments).envs(command.env.iter().cloned());
        process
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        // SAFETY: between fork and exec only setsid, prctl and getppid are called, which are async-signal-safe and
        // allocate nothing (an error is a plain errno).
        unsafe {
            process.pre_exec(move || {
                setsid()?;
                prctl::set_pdeathsig(Signal::SIGTERM)?;
                // The launcher may have died before the line above took effect.
                if getppid() != launcher {
                    Err(nix::errno::Errno::ESRCH.into())
                } else {
                    Ok(())
                }
            });
        }
        let mut child = process.spawn().with_context(|| not_started(program))?;
        let pid = i32::try_from(child.id()).context("process id out of range")?;
        let engine_output = command.output;
        if let Some(stdout) = child.stdout.take() {
            read_in_background(stdout, Demux::new(engine_output, false), reports.clone())?;
        }
        if let Some(stderr) = child.stderr.take() {
            read_in_background(stderr, Demux::new(engine_output, true), reports.clone())?;
        }
        wait_in_background(Pid::from_raw(pid), reports.clone())?;
        Ok(Engine {
            child,
            session: Pid::from_raw(pid),
        })
    }

    /// Sends a signal to the engine's main process. mpirun hands USR1 on to all ranks, and ends them on TERM.
    pub fn signal(&self, signal: Signal) {
        // The process is not reaped before `finish`, so its id cannot have passed to another. It may be gone: fine.
        let _ = kill(self.session, signal);
    }

    /// Kills every process of the session, ranks included (mpirun gives each a process group of its own).
    pub fn kill_all(&self) {
        // Again until nothing is left, because a process may be forking; bounded, because a process in the kernel's
        // uninterruptible sleep dies only when that ends.
        for _ in 0..20 {
            let members = members(self.session);
            if members.is_empty() {
                return;
            }
            for pid in members {
                let _ = kill(pid, Signal::SIGKILL);
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Ends what is left of the session after its main process has ended.
    pub fn finish(mut self) {
        self.kill_all();
        // Only to collect the exit status, which the waiting thread has already reported.
        let _ = self.child.try_wait();
    }
}

fn not_started(program: &OsStr) -> String {
    let hint = if program == "mpirun" {
        "; install OpenMPI (Debian: apt-get install openmpi-bin)"
    } else {
        ""
    };
    format!("cannot start {}{hint}", program.display())
}

fn read_in_background(
    mut stream: impl Read + Send + 'static,
    mut demux: Demux,
    reports: SyncSender<Report>,
) -> anyhow::Result<()> {
    let work = move || {
        let mut buffer = [0; 16 * 1024];
        // Sending fails only when the launcher is about to exit.
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => demux.push(&buffer[..count]).into_iter().for_each(|line| {
                    let _ = reports.send(Report::Line(line));
                }),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        for line in demux.finish() {
            let _ = reports.send(Report::Line(line));
        }
        let _ = reports.send(Report::Closed);
    };
    std::thread::Builder::new()
        .name("engine-output".to_owned())
        .spawn(work)
        .context("cannot start a thread")?;
    Ok(())
}

/// Reports the end of the process and leaves it unreaped, so that its id (the session's) stays taken.
fn wait_in_background(pid: Pid, reports: SyncSender<Report>) -> anyhow::Result<()> {
    let work = move || {
        let ended = loop {
            match waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
                Ok(WaitStatus::Exited(_, code)) => break Ended::Exit(code),
                Ok(WaitStatus::Signaled(_, signal, _)) => break Ended::Signal(signal as i32),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                // It is our child and nobody else reaps it; still, never wait for what cannot come.
                Err(_) => break Ended::Exit(configs::exit::FAILED),
            }
        };
        let _ = reports.send(Report::Ended(ended));
    };
    std::thread::Builder::new()
        .name("engine-wait".to_owned())
        .spawn(work)
        .context("cannot start a thread")?;
    Ok(())
}

/// Live processes of a session, from /proc.
fn members(session: Pid) -> Vec<Pid> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    ids.filter(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .ok()
            .and_then(|stat| live_session(&stat))
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
