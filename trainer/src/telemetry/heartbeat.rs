use configs::beat::Beat;
use configs::events::is_launcher_listening;
use configs::phases::{self, Phase, Seen};
use std::io::Write;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two beats, in a world of no more than 64 ranks.
const PERIOD: Duration = Duration::from_millis(500);
/// What a launcher has to read at most every second for one rank more.
const PERIOD_PER_RANK: Duration = Duration::from_millis(8);
/// A phase that lasts so long is told of at once.
const LONG_PHASE: Duration = Duration::from_millis(100);
/// How often the thread looks.
const LOOK: Duration = Duration::from_millis(50);
/// With more than that unread, beats are left out: a launcher that is stopped must not stop the run by a pipe that is full.
const MOST_UNREAD: libc::c_int = 16 * 1024;

/// The thread that tells the launcher, again and again, what the step loop is at. It goes on while that waits or computes.
pub struct Heartbeat {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Heartbeat {
    /// Starts it if the launcher listens. Without it a run is as good; so it is no error if there is no thread to be had.
    pub fn start(world_size: usize) -> Self {
        let none = Self { stop: None, thread: None };
        if !is_launcher_listening() {
            return none;
        }
        phases::watch();
        let period = PERIOD.max(PERIOD_PER_RANK * world_size.try_into().unwrap_or(u32::MAX));
        let (stop, stopped) = channel();
        let host = collective::host_name();
        let mut last: Option<(Instant, u64)> = None;
        let work = move || {
            loop {
                let is_over = stopped.recv_timeout(LOOK) != Err(RecvTimeoutError::Timeout);
                let Some(seen) = phases::now() else { return };
                let is_due = last.is_none_or(|(when, change)| {
                    when.elapsed() >= period || (change != seen.change && seen.since >= LONG_PHASE)
                });
                if is_over || is_due {
                    tell(&beat(&host, &seen, is_over));
                    last = Some((Instant::now(), seen.change));
                }
                if is_over {
                    return;
                }
            }
        };
        match std::thread::Builder::new().name("heartbeat".to_owned()).spawn(work) {
            Ok(thread) => Self { stop: Some(stop), thread: Some(thread) },
            Err(error) => {
                eprintln!("trainer: warning: no thread for heartbeats: {error}");
                none
            }
        }
    }
}

/// The last beat says that no more will come.
impl Drop for Heartbeat {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn beat(host: &str, seen: &Seen, is_over: bool) -> Beat {
    Beat {
        host: host.to_owned(),
        step: seen.step,
        phase: if is_over { Phase::End } else { seen.phase },
        phase_s: if is_over { 0.0 } else { seen.since.as_secs_f64() },
        own_s: seen.own.as_secs_f64(),
        data_s: seen.data.as_secs_f64(),
        reduce_s: seen.reduce.as_secs_f64(),
        memory_bytes: resident_bytes(),
    }
}

fn tell(beat: &Beat) {
    let mut stdout = std::io::stdout().lock();
    if beat.phase == Phase::End || has_room() {
        // A reader that has gone away must not stop the run.
        let _ = writeln!(stdout, "{}", beat.to_line());
    }
}

/// Whether a line can be written to stdout without waiting for whoever reads it.
fn has_room() -> bool {
    let mut unread: libc::c_int = 0;
    let mut stdout = libc::pollfd { fd: libc::STDOUT_FILENO, events: libc::POLLOUT, revents: 0 };
    // SAFETY: both calls get pointers to one live local of the type that they document. FIONREAD fails on what is no pipe or
    // terminal, where nothing is waited for, and leaves `unread` at 0.
    let is_ready = unsafe {
        libc::ioctl(libc::STDOUT_FILENO, libc::FIONREAD, &raw mut unread);
        libc::poll(&raw mut stdout, 1, 0) == 1
    };
    is_ready && stdout.revents & libc::POLLOUT != 0 && unread <= MOST_UNREAD
}

/// From the second number of /proc/self/statm; 0 where there is none.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf takes a number and touches no memory.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages * u64::try_from(page_bytes).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_a_name_and_memory() {
        assert!(!collective::host_name().is_empty());
        assert!(resident_bytes() > 1 << 20, "{}", resident_bytes());
    }
}
