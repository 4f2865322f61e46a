//! What the end of an engine means: the exit code, and the sentence that says why.

use configs::exit;

use super::faults::Ended;
use crate::plan::Job;

/// Everything about a run's end that the verdict depends on.
#[derive(Debug, Clone)]
pub struct End {
    /// How the engine's main process ended.
    pub ended: Ended,
    /// What the ranks were started for.
    pub job: Job,
    /// The event was seen that says that everything is done: the last step is committed, all samples are written.
    pub is_done: bool,
    /// A `start` event was seen.
    pub is_started: bool,
    /// Last step of the plan.
    pub steps: u64,
    /// Why the launcher ended the group itself, if it did.
    pub forced: Option<&'static str>,
    /// Somebody had asked the run to stop.
    pub is_stop_asked: bool,
    /// The failing rank in words, if one is known.
    pub fault: Option<String>,
    /// Step of the last checkpoint that was committed or resumed from, as far as seen.
    pub saved_step: Option<u64>,
}

impl End {
    /// The launcher's exit code and its last line.
    pub fn verdict(&self) -> (i32, String) {
        match self.job {
            Job::Train => self.of_training(),
            Job::Sample => self.of_batches("all samples are written", "no samples were written"),
            Job::Validate => self.of_measuring("validated", "no losses were computed"),
            Job::Evaluate => self.of_measuring("evaluated", "no scores were computed"),
            Job::Doctor => self.of_measuring("nothing is wrong", "see the lines above"),
        }
    }

    /// The same with the place of the fault in its words.
    pub fn at(self, place: Option<String>) -> End {
        let fault = match (self.fault, place) {
            (Some(fault), Some(place)) => Some(format!("{fault}; {place}")),
            (fault, _) => fault,
        };
        End { fault, ..self }
    }

    /// What went wrong: the rank or node, or else the engine.
    pub fn cause(&self) -> String {
        self.fault.clone().unwrap_or_else(|| format!("the engine ended: {}", self.ended))
    }

    /// Of work that ends without an error only when its result is there.
    fn of_measuring(&self, done: &str, nothing: &str) -> (i32, String) {
        let is_done = self.is_done || self.ended == Ended::Exit(exit::OK);
        Self { is_done, ..self.clone() }.of_batches(done, nothing)
    }

    /// Of work that is either done or not: there is nothing to go on from.
    fn of_batches(&self, done: &str, nothing: &str) -> (i32, String) {
        let cause = self.fault.clone().map(|fault| format!(" ({fault})")).unwrap_or_default();
        match (self.forced, self.ended, &self.fault) {
            (Some(why), ..) => (exit::FAILED, format!("all ranks were ended: {why}{cause}; {nothing}")),
            (_, Ended::Exit(exit::OK), _) if self.is_done => (exit::OK, done.to_owned()),
            // `trainer sample --help` and the like.
            (_, Ended::Exit(exit::OK), _) if !self.is_started => (exit::OK, "nothing was to be drawn".to_owned()),
            _ if self.is_stop_asked => (exit::FAILED, format!("stopped on request; {nothing}")),
            (_, Ended::Exit(exit::USAGE), fault) => {
                (exit::USAGE, fault.clone().unwrap_or_else(|| "the ranks refused the command line".to_owned()))
            }
            (_, _, Some(fault)) => (exit::FAILED, format!("{fault}; all ranks were ended; {nothing}")),
            (_, ended, None) => {
                (exit::FAILED, format!("the engine ended: {ended}; no rank was named as the cause; {nothing}"))
            }
        }
    }

    fn of_training(&self) -> (i32, String) {
        let resume = match self.saved_step {
            Some(step) => format!("run the same command again to continue from step {step}"),
            None => "no checkpoint was seen in this start; the same command takes the last committed one".to_owned(),
        };
        if let Some(why) = self.forced {
            let cause = self.fault.clone().map(|fault| format!(" ({fault})")).unwrap_or_default();
            return (exit::FAILED, format!("all ranks were ended: {why}{cause}; {resume}"));
        }
        match (self.ended, &self.fault) {
            (Ended::Exit(exit::OK), _) if self.is_done => {
                (exit::OK, format!("step {} of {} reached", self.steps, self.steps))
            }
            (Ended::Exit(exit::OK), _) => (
                exit::FAILED,
                format!("the ranks ended without an error, but step {} was not reported as done; {resume}", self.steps),
            ),
            (Ended::Exit(exit::RESUMABLE), _) => (exit::RESUMABLE, format!("stopped and saved; {resume}")),
            (ended, _) if self.is_stop_asked && !self.is_started => {
                (exit::FAILED, format!("stopped before the run had started ({ended}); nothing was saved by this start"))
            }
            (Ended::Exit(exit::USAGE), fault) => (
                exit::USAGE,
                fault.clone().unwrap_or_else(|| "the ranks refused the config or the command line".to_owned()),
            ),
            (_, Some(fault)) => (exit::FAILED, format!("{fault}; all ranks were ended; {resume}")),
            (ended, None) => {
                (exit::FAILED, format!("the engine ended: {ended}; no rank was named as the cause; {resume}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(ended: Ended) -> End {
        End {
            ended,
            job: Job::Train,
            is_done: false,
            is_started: true,
            steps: 9,
            forced: None,
            is_stop_asked: false,
            fault: None,
            saved_step: Some(5),
        }
    }

    #[test]
    fn only_a_reported_last_step_is_success() {
        assert_eq!(end(Ended::Exit(0)).verdict().0, exit::FAILED);
        assert_eq!(End { is_done: true, ..end(Ended::Exit(0)) }.verdict().0, exit::OK);
        assert_eq!(End { is_done: true, ..end(Ended::Exit(1)) }.verdict().0, exit::FAILED);
    }

    #[test]
    fn sampling_is_done_when_the_samples_are_written() {
        let sampling = |ended| End { job: Job::Sample, ..end(ended) };
        assert_eq!(End { is_done: true, ..sampling(Ended::Exit(0)) }.verdict().0, exit::OK);
        assert_eq!(sampling(Ended::Exit(0)).verdict().0, exit::FAILED);
        let (code, text) = End { is_stop_asked: true, ..sampling(Ended::Exit(1)) }.verdict();
        assert_eq!((code, text.as_str()), (exit::FAILED, "stopped on request; no samples were written"));
        let (code, text) = End { fault: Some("rank 1 failed: bad".into()), ..sampling(Ended::Exit(1)) }.verdict();
        assert!(code == exit::FAILED && text.starts_with("rank 1 failed: bad") && !text.contains("step"), "{text}");
    }

    #[test]
    fn evaluation_is_done_when_it_ends_without_an_error() {
        let evaluation = |ended| End { job: Job::Evaluate, ..end(ended) };
        assert_eq!(evaluation(Ended::Exit(0)).verdict(), (exit::OK, "evaluated".to_owned()));
        let validation = End { job: Job::Validate, ..end(Ended::Exit(0)) };
        assert_eq!(validation.verdict(), (exit::OK, "validated".to_owned()));
        let (code, text) = End { fault: Some("rank 1 failed: bad".into()), ..evaluation(Ended::Exit(1)) }.verdict();
        assert_eq!(
            (code, text.as_str()),
            (exit::FAILED, "rank 1 failed: bad; all ranks were ended; no scores were computed")
        );
        assert_eq!(End { forced: Some("asked twice"), ..evaluation(Ended::Exit(0)) }.verdict().0, exit::FAILED);
    }

    #[test]
    fn codes_that_scripts_act_on_pass_through_and_others_become_failure() {
        assert_eq!(end(Ended::Exit(75)).verdict().0, exit::RESUMABLE);
        assert_eq!(end(Ended::Exit(2)).verdict().0, exit::USAGE);
        for ended in [Ended::Exit(3), Ended::Exit(137), Ended::Signal(9), Ended::Signal(15)] {
            assert_eq!(end(ended).verdict().0, exit::FAILED, "{ended}");
        }
        assert_eq!(End { forced: Some("asked twice"), is_done: true, ..end(Ended::Exit(0)) }.verdict().0, exit::FAILED);
    }

    #[test]
    fn the_place_of_a_fault_is_in_the_last_line_and_not_in_what_tells_failures_apart() {
        let end = End { fault: Some("rank 1 failed".into()), ..end(Ended::Exit(3)) };
        assert_eq!(end.cause(), "rank 1 failed");
        let (_, text) = end.at(Some("it was on dn1 at step 7 in phase data".into())).verdict();
        assert!(
            text.starts_with("rank 1 failed; it was on dn1 at step 7 in phase data; all ranks were ended"),
            "{text}"
        );
    }

    #[test]
    fn the_last_line_says_who_and_from_where_to_go_on() {
        let (_, text) = End { fault: Some("rank 1 failed (exit code 3)".into()), ..end(Ended::Exit(3)) }.verdict();
        assert!(text.starts_with("rank 1 failed (exit code 3)") && text.ends_with("continue from step 5"), "{text}");
    }
}
