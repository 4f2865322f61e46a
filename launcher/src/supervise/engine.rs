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
use super::guard::Guard;
use super::session;
use crate::cluster::{EngineCommand, token};
use crate::status::server::TOKEN_VARIABLES;

/// A running engine.
pub struct Engine {
    child: Child,
    session: Pid,
    guard: Guard,
}

impl Engine {
    /// Starts the engine; its lines, the ends of its two streams and its own end come as reports.
    ///
    /// In a session of its own, so that a Ctrl-C at the terminal reaches the launcher alone. The kernel ends it when
    /// the *thread* that started it ends: call this from the main thread.
    pub fn start(command: &EngineCommand, reports: &SyncSender<Report>) -> anyhow::Result<Engine> {
        let (program, arguments) =
            command.argv.split_first().ok_or_else(|| anyhow!("the engine's command is empty"))?;
        let launcher = getpid();
        let mut process = Command::new(program);
        process.args(arguments).envs(command.env.iter().cloned());
        if command.meets_over_tcp {
            process.envs(token::for_one_start()?);
        }
        TOKEN_VARIABLES.iter().for_each(|name| _ = process.env_remove(name));
        process.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: between fork and exec only setsid, prctl and getppid are called, which are async-signal-safe and
        // allocate nothing (an error is a plain errno).
        unsafe {
            process.pre_exec(move || {
                setsid()?;
                prctl::set_pdeathsig(Signal::SIGTERM)?;
                // The launcher may have died before the line above took effect.
                if getppid() != launcher { Err(nix::errno::Errno::ESRCH.into()) } else { Ok(()) }
            });
        }
        let mut guard = Guard::start()?;
        let mut child = process.spawn().with_context(|| not_started(program))?;
        let pid = i32::try_from(child.id()).context("process id out of range")?;
        let session = Pid::from_raw(pid);
        guard.watch(session)?;
        if let Some(stdout) = child.stdout.take() {
            read_in_background(stdout, Demux::new(command.output, false), reports.clone())?;
        }
        if let Some(stderr) = child.stderr.take() {
            read_in_background(stderr, Demux::new(command.output, true), reports.clone())?;
        }
        wait_in_background(session, reports.clone())?;
        Ok(Engine { child, session, guard })
    }

    /// Sends a signal to the engine's main process. mpirun hands USR1 on to all ranks, and ends them on TERM.
    pub fn signal(&self, signal: Signal) {
        // The process is not reaped before `finish`, so its id cannot have passed to another. It may be gone: fine.
        let _ = kill(self.session, signal);
    }

    /// Kills every process of the session, ranks included (mpirun gives each a process group of its own).
    pub fn kill_all(&self) {
        session::kill_all(self.session);
    }

    /// Ends what is left of the session after its main process has ended.
    pub fn finish(mut self) {
        self.kill_all();
        // Only to collect the exit status, which the waiting thread has already reported.
        let _ = self.child.try_wait();
        self.guard.release();
    }
}

fn not_started(program: &OsStr) -> String {
    let hint = if program == "mpirun" { "; install OpenMPI (Debian: apt-get install openmpi-bin)" } else { "" };
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
    std::thread::Builder::new().name("engine-output".to_owned()).spawn(work).context("cannot start a thread")?;
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
    std::thread::Builder::new().name("engine-wait".to_owned()).spawn(work).context("cannot start a thread")?;
    Ok(())
}
