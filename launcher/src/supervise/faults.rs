//! Which rank failed, and how: from the ranks' own error lines and from what mpirun says about them.

use std::time::Duration;

use configs::exit;
use nix::sys::signal::Signal;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// With an exit code.
    Exit(i32),
    /// By a signal.
    Signal(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Exit(code) => write!(f, "exit code {code}"),
            Ended::Signal(number) => match Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by signal {number} ({signal})"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
        }
    }
}

/// What is known about failed ranks. The first report counts: later failures are mostly its consequences.
#[derive(Debug, Default)]
pub struct Faults {
    /// First rank that the engine reported as gone.
    ended: Option<(usize, Option<Ended>)>,
    /// First error line of each rank, in the order of arrival.
    said: Vec<(usize, String)>,
    /// First machine that the engine has lost.
    lost_node: Option<String>,
    /// The rank that was given up because nothing was heard of it for so long.
    silent: Option<(usize, Duration)>,
    /// Lines of mpirun's message that is being received.
    message: Option<Vec<String>>,
}

impl Faults {
    /// Some rank has failed.
    pub fn any(&self) -> bool {
        self.ended.is_some() || !self.said.is_empty() || self.lost_node.is_some()
    }

    /// Nothing has been heard of a rank for so long that it is given up; what fails from now on is the consequence.
    pub fn rank_silent(&mut self, rank: usize, time: Duration) {
        self.silent.get_or_insert((rank, time));
    }

    /// The rank that [`Faults::describe`] names first.
    pub fn culprit(&self) -> Option<usize> {
        if let Some((rank, _)) = self.silent {
            return Some(rank);
        }
        match (self.ended, self.said.first()) {
            _ if self.lost_node.is_some() => None,
            (Some((rank, Some(Ended::Signal(_)))), _) | (Some((rank, _)), None) => Some(rank),
            (_, said) => said.map(|(speaker, _)| *speaker),
        }
    }

    /// The machine that [`Faults::describe`] names.
    pub fn lost_node(&self) -> Option<&str> {
        self.lost_node.as_deref().filter(|_| self.silent.is_none())
    }

    /// Takes a stderr line of a rank. Error lines begin with `trainer: error:` (or `trainer:`); warnings and notes say so.
    pub fn rank_line(&mut self, rank: usize, text: &str) {
        let Some(error) = text.strip_prefix("trainer:").map(str::trim) else {
            return;
        };
        let harmless = ["warning", "note", "info"].iter().any(|word| error.starts_with(word));
        let error = error.strip_prefix("error:").map_or(error, str::trim);
        // One rank may speak for all; the message then begins with the rank that it is about.
        let named = error.strip_prefix("rank ").and_then(|rest| rest.split_once(": "));
        let named = named.and_then(|(rank, reason)| Some((rank.parse().ok()?, reason)));
        let (rank, error) = named.unwrap_or((rank, error));
        if !harmless && !self.said.iter().any(|(known, _)| *known == rank) {
            self.said.push((rank, error.to_owned()));
        }
    }

    /// Takes a line of mpirun itself; gives back the lines that are worth showing. Its messages stand between lines of
    /// dashes; those that only say which rank ended are understood and not shown.
    pub fn engine_line(&mut self, text: &str) -> Vec<String> {
        let is_dashes = text.len() >= 20 && text.bytes().all(|byte| byte == b'-');
        match (self.message.take(), is_dashes) {
            (None, true) => self.message = Some(Vec::new()),
            (Some(message), true) => return self.message_ended(message),
            (Some(mut message), false) => {
                message.push(text.to_owned());
                self.message = Some(message);
            }
            (None, false) if text.trim().is_empty() || text.starts_with("mpirun: Forwarding signal") => {}
            (None, false) => match parse_srun(text) {
                Some((rank, ended)) => self.rank_ended(rank, ended),
                None => return vec![text.to_owned()],
            },
        }
        Vec::new()
    }

    /// The engine has ended; gives back what is left of an unfinished message.
    pub fn finish(&mut self) -> Vec<String> {
        let message = self.message.take().unwrap_or_default();
        self.message_ended(message)
    }

    /// A process that is a rank itself has ended.
    pub fn rank_ended(&mut self, rank: usize, ended: Ended) {
        if !matches!(ended, Ended::Exit(exit::OK | exit::RESUMABLE)) {
            self.ended.get_or_insert((rank, Some(ended)));
        }
    }

    /// The failure in words, beginning with the rank; `None` if no rank is known to have failed.
    ///
    /// A rank that was killed says nothing, so mpirun's word counts; otherwise the rank that complained first is the
    /// cause, even if another one, which lost its partner, ended before it.
    pub fn describe(&self) -> Option<String> {
        if let Some((rank, time)) = self.silent {
            let time = time.as_secs();
            return Some(format!(
                "rank {rank} gave no sign of life for {time} s: it is stopped, or its machine or link is down"
            ));
        }
        if let Some(node) = &self.lost_node {
            return Some(format!("node {node} is lost: it is down, or the link to it is"));
        }
        let how = |ended: Option<Ended>| ended.map(|ended| format!(" ({ended})")).unwrap_or_default();
        match (self.ended, self.said.first()) {
            (None, None) => None,
            (Some((rank, ended)), None) | (Some((rank, ended @ Some(Ended::Signal(_)))), _) => {
                let own = self.said.iter().find(|(speaker, _)| *speaker == rank);
                let own = own.map(|(_, said)| format!(": {said}")).unwrap_or_default();
                Some(format!("rank {rank} failed{}{own}", how(ended)))
            }
            (Some((rank, ended)), Some((speaker, said))) if rank == *speaker => {
                Some(format!("rank {rank} failed{}: {said}", how(ended)))
            }
            (Some((rank, ended)), Some((speaker, said))) => {
                Some(format!("rank {speaker} failed: {said}; rank {rank} ended first{}", how(ended)))
            }
            (None, Some((speaker, said))) => Some(format!("rank {speaker} failed: {said}")),
        }
    }

    fn message_ended(&mut self, message: Vec<String>) -> Vec<String> {
        let text = message.join("\n");
        if let Some(node) = lost_node(&text) {
            self.lost_node.get_or_insert(node);
            return Vec::new();
        }
        if let Some((rank, ended)) = parse_message(&text) {
            match ended {
                Some(ended) => self.rank_ended(rank, ended),
                None => {
                    self.ended.get_or_insert((rank, None));
                }
            }
            return Vec::new();
        }
        if text.starts_with("Primary job  terminated normally") {
            return Vec::new();
        }
        message.into_iter().filter(|line| !line.trim().is_empty()).collect()
    }
}

/// Understands OpenMPI's messages about a rank that ended: by a signal, with an exit code, or by MPI_Abort.
fn parse_message(text: &str) -> Option<(usize, Option<Ended>)> {
    if let Some(rest) = after(text, "noticed that process rank ") {
        let signal = after(rest, "exited on signal ").and_then(leading_number);
        return Some((leading_number(rest)?, signal.map(Ended::Signal)));
    }
    if let Some(rest) = after(text, "MPI_ABORT was invoked on rank ") {
        let code = after(rest, "with errorcode ").and_then(leading_number);
        return Some((leading_number(rest)?, code.map(Ended::Exit)));
    }
    // "Process name: [[40321,1],1]" and "Exit code:    3"
    let name = after(text, "Process name:")?.lines().next()?;
    let rank = leading_number(name.rsplit_once(',')?.1)?;
    let code = after(text, "Exit code:").and_then(leading_number);
    Some((rank, code.map(Ended::Exit)))
}

/// The machine that OpenMPI says it has lost: `Remote daemon: [[1368,0],2] on node node2`.
fn lost_node(text: &str) -> Option<String> {
    let told = text.starts_with("ORTE has lost communication with a remote daemon");
    let node = after(after(text, "Remote daemon").filter(|_| told)?, "on node ")?;
    node.split_whitespace().next().map(str::to_owned)
}

/// Understands srun's word on how a task ended: `srun: error: NODE: task 3: Exited with exit code 1`. What is terminated is the
/// consequence of another's end.
fn parse_srun(text: &str) -> Option<(usize, Ended)> {
    let (_node, rest) = text.strip_prefix("srun: error: ")?.split_once(": task")?;
    let (tasks, how) = rest.split_once(": ")?;
    let rank = leading_number(tasks.trim_start_matches('s'))?;
    let signals = [("Killed", 9), ("Segmentation fault", 11), ("Aborted", 6), ("Bus error", 7), ("Out Of Memory", 9)];
    let signal = signals.iter().find(|(said, _)| how.starts_with(said)).map(|(_, signal)| Ended::Signal(*signal));
    let exit = || after(how, "exit code ").and_then(leading_number).map(Ended::Exit);
    Some((rank, signal.or_else(exit)?))
}

fn after<'a>(text: &'a str, phrase: &str) -> Option<&'a str> {
    text.split_once(phrase).map(|(_, rest)| rest)
}

fn leading_number<N: std::str::FromStr>(text: &str) -> Option<N> {
    let text = text.trim_start();
    text[..text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len())].parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const DASHES: &str = "--------------------------------------------------------------------------";

    /// What is shown, and what is known afterwards.
    fn after_message(text: &str) -> (Vec<String>, Option<String>) {
        let mut faults = Faults::default();
        let shown = [DASHES]
            .into_iter()
            .chain(text.lines())
            .chain([DASHES])
            .flat_map(|line| faults.engine_line(line))
            .collect();
        (shown, faults.describe())
    }

    #[test]
    fn mpiruns_messages_name_the_rank() {
        let killed = "mpirun noticed that process rank 1 with PID 0 on node vm exited on signal 9 (Killed).";
        assert_eq!(after_message(killed), (vec![], Some("rank 1 failed (killed by signal 9 (SIGKILL))".into())));
        let exited = "mpirun detected that one or more processes exited with non-zero status, thus causing\nthe job to be terminated. The first process to do so was:\n\n  Process name: [[11033,1],12]\n  Exit code:    3";
        assert_eq!(after_message(exited), (vec![], Some("rank 12 failed (exit code 3)".into())));
        let aborted = "MPI_ABORT was invoked on rank 3 in communicator MPI_COMM_WORLD\nwith errorcode 42.\n\nNOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.";
        assert_eq!(after_message(aborted), (vec![], Some("rank 3 failed (exit code 42)".into())));
    }

    #[test]
    fn a_lost_node_is_the_cause_whatever_the_ranks_say() {
        let mut faults = Faults::default();
        faults.rank_line(0, "trainer: error: all_reduce did not complete");
        let lost = "ORTE has lost communication with a remote daemon.\n\n  HNP daemon   : [[1368,0],0] on node node0\n  Remote daemon: [[1368,0],2] on node node2\n\nThis is usually due to a failure of the TCP network";
        [DASHES].into_iter().chain(lost.lines()).chain([DASHES]).for_each(|line| drop(faults.engine_line(line)));
        assert_eq!(faults.describe().unwrap(), "node node2 is lost: it is down, or the link to it is");
    }

    #[test]
    fn sruns_messages_name_the_rank() {
        let described = |texts: &[&str]| {
            let mut faults = Faults::default();
            let shown: Vec<String> = texts.iter().flat_map(|text| faults.engine_line(text)).collect();
            (shown, faults.describe())
        };
        let killed = described(&["srun: error: sn1: task 3: Killed", "srun: error: sn0: tasks 0-2: Terminated"]);
        assert_eq!(killed.1.unwrap(), "rank 3 failed (killed by signal 9 (SIGKILL))");
        assert_eq!(killed.0, ["srun: error: sn0: tasks 0-2: Terminated"]);
        let exited = described(&["srun: error: sn1: tasks 2-3: Exited with exit code 1"]);
        assert_eq!(exited, (vec![], Some("rank 2 failed (exit code 1)".into())));
        assert_eq!(described(&["srun: error: sn1: tasks 0-3: Exited with exit code 75"]), (vec![], None));
        let other = "srun: error: Unable to create step: invalid node";
        assert_eq!(described(&[other]), (vec![other.to_owned()], None));
    }

    #[test]
    fn a_saved_rank_is_no_failure() {
        let saved = "The first process to do so was:\n\n  Process name: [[11021,1],0]\n  Exit code:    75";
        assert_eq!(after_message(saved), (vec![], None));
    }

    #[test]
    fn other_messages_are_shown() {
        let (shown, known) = after_message("mpirun was unable to launch the specified application\n\nExecutable: /x");
        assert_eq!(shown, ["mpirun was unable to launch the specified application", "Executable: /x"]);
        assert_eq!(known, None);
        assert_eq!(
            Faults::default().engine_line("2 total processes failed to start"),
            ["2 total processes failed to start"]
        );
    }

    #[test]
    fn a_message_cut_short_is_still_understood_or_shown() {
        let mut faults = Faults::default();
        faults.engine_line(DASHES);
        faults.engine_line("something odd");
        assert_eq!(faults.finish(), ["something odd"]);
    }

    #[test]
    fn the_rank_that_complained_first_is_the_cause() {
        let mut faults = Faults::default();
        faults.rank_line(2, "trainer: warning: slow disk");
        faults.rank_line(2, "some other line");
        assert!(!faults.any());
        faults.rank_line(1, "trainer: error: part.parquet: cut off");
        faults.rank_line(0, "trainer: rank 1 is gone");
        assert_eq!(faults.describe().unwrap(), "rank 1 failed: part.parquet: cut off");
        faults.rank_ended(0, Ended::Exit(1));
        assert_eq!(
            faults.describe().unwrap(),
            "rank 1 failed: part.parquet: cut off; rank 0 ended first (exit code 1)"
        );
        assert_eq!(faults.culprit(), Some(1));
    }

    #[test]
    fn a_silent_rank_is_the_cause_of_what_follows() {
        let mut faults = Faults::default();
        faults.rank_silent(2, Duration::from_secs(31));
        faults.rank_line(0, "trainer: error: rank 2 is gone");
        faults.rank_ended(1, Ended::Signal(15));
        assert!(faults.describe().unwrap().starts_with("rank 2 gave no sign of life for 31 s: it is stopped"));
        assert_eq!((faults.culprit(), faults.lost_node()), (Some(2), None));
    }

    #[test]
    fn a_killed_rank_is_the_cause_whatever_the_others_say() {
        let mut faults = Faults::default();
        faults.rank_line(0, "trainer: rank 1 is gone");
        faults.rank_ended(1, Ended::Signal(9));
        faults.rank_ended(0, Ended::Exit(1));
        assert_eq!(faults.describe().unwrap(), "rank 1 failed (killed by signal 9 (SIGKILL))");
        assert_eq!(faults.culprit(), Some(1));
    }
}
