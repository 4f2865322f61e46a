//! Starts the group, and starts it again after a failure: on the machines that answer, as often as the budget allows.

use std::io::ErrorKind;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::bail;
use configs::{RunConfig, exit};

use crate::cli::Nodes;
use crate::cluster::{self, Start, TrainerCall};
use crate::machine::Machine;
use crate::plan::{Job, Plan, Request};
use crate::status::Status;
use crate::supervise::{Ending, Supervisor, say};

/// Restarts of `--nodes A..B` where nothing else is said.
const RESTARTS_OF_A_RANGE: u32 = 10;
/// The same failure at the same checkpoint so often in a row is not bad luck.
const HOPELESS: u32 = 3;
/// Between a failure and the first restart; doubled for every further one without a checkpoint in between.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// A machine that does not answer within this time is not there.
const ANSWER: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// What is to be run.
pub struct Runner<'a> {
    pub config: &'a RunConfig,
    pub request: Request,
    pub trainer: &'a TrainerCall,
    pub status: Arc<Status>,
}

impl Runner<'_> {
    /// Runs to the end, or to a failure after which there is no further start. Gives the launcher's exit code.
    ///
    /// # Errors
    /// Too few machines answer, or the engine cannot be started.
    pub fn run(&self, restarts: Option<u32>) -> anyhow::Result<i32> {
        let silence_s = self.config.cluster.silence_s;
        let silence = (silence_s > 0).then(|| Duration::from_secs(silence_s));
        let supervisor = Supervisor::new(self.status.clone(), silence)?;
        let is_range = self.request.nodes.is_some_and(|nodes| nodes.least < nodes.most);
        let budget = restarts.or(self.config.cluster.restarts);
        let mut history = History::new(budget.unwrap_or(if is_range { RESTARTS_OF_A_RANGE } else { 0 }));
        loop {
            let (code, pause) = match self.plan_of_those_there(is_range || history.starts > 0)? {
                Ok(plan) => {
                    let ending = self.start(&plan, &supervisor)?;
                    (ending.code, history.after(ending))
                }
                Err(too_few) => {
                    say(&format!("launcher: {too_few}"));
                    (exit::FAILED, history.again(&too_few))
                }
            };
            let pause = match pause {
                Ok(pause) if !supervisor.is_asked() && self.request.job == Job::Train => pause,
                Ok(_) => return Ok(code),
                Err(reason) => {
                    reason.iter().for_each(|reason| say(&format!("launcher: {reason}")));
                    return Ok(code);
                }
            };
            let (starts, budget) = (history.starts, history.budget);
            say(&format!("launcher: starting again in {} s (restart {starts} of {budget})", pause.as_secs()));
            let until = Instant::now() + pause;
            while Instant::now() < until && !supervisor.is_asked() {
                std::thread::sleep(POLL);
            }
            if supervisor.is_asked() {
                say("launcher: asked to stop while nothing runs; the same command goes on from the last checkpoint");
                return Ok(if history.saved_step().is_some() { exit::RESUMABLE } else { exit::FAILED });
            }
        }
    }

    fn start(&self, plan: &Plan, supervisor: &Supervisor) -> anyhow::Result<Ending> {
        for note in &plan.notes {
            say(&format!("launcher: note: {note}"));
        }
        match cluster::for_plan(plan, self.config).start(plan, self.trainer)? {
            Start::Engine(command) => supervisor.run(&command, plan),
            Start::Handover(_) => bail!("{} does not start ranks itself", plan.via),
        }
    }

    /// A plan over the machines that answer, if they are to be asked; or how many are missing.
    fn plan_of_those_there(&self, ask: bool) -> anyhow::Result<Result<Plan, String>> {
        let mut request = self.request.clone();
        let named = if request.hosts.is_empty() { &self.config.cluster.hosts } else { &request.hosts };
        if ask && !named.is_empty() {
            let wanted = request.nodes.unwrap_or(Nodes::exactly(named.len()));
            let (there, silent) = those_that_answer(&self.config.cluster.remote_shell, named);
            let silent: String = silent.iter().map(|(host, why)| format!("; {host}: {why}")).collect();
            if there.len() < wanted.least {
                let (count, least) = (there.len(), wanted.least);
                return Ok(Err(format!("{count} node(s) answer, at least {least} are needed{silent}")));
            }
            if !silent.is_empty() {
                say(&format!("launcher: note: {} of {} nodes answer{silent}", there.len(), named.len()));
            }
            request.hosts = there;
        }
        Ok(Ok(Plan::new(self.config, &request, &Machine::this_host())?))
    }
}

/// Runs `true` on every host at once.
fn those_that_answer(remote_shell: &str, hosts: &[String]) -> (Vec<String>, Vec<(String, String)>) {
    let started: Vec<_> = hosts
        .iter()
        .map(|host| {
            let mut shell = Command::new(remote_shell);
            shell.args([host, "true"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            (host.clone(), shell.spawn())
        })
        .collect();
    let until = Instant::now() + ANSWER;
    let (mut there, mut silent) = (Vec::new(), Vec::new());
    for (host, child) in started {
        let answer = child.and_then(|mut child| {
            loop {
                match child.try_wait()? {
                    Some(ended) => return Ok(ended),
                    None if Instant::now() < until => std::thread::sleep(POLL),
                    None => {
                        child.kill()?;
                        child.wait()?;
                        return Err(ErrorKind::TimedOut.into());
                    }
                }
            }
        });
        match answer {
            Ok(ended) if ended.success() => there.push(host),
            Ok(ended) => silent.push((host, format!("{remote_shell} ended with {ended}"))),
            Err(error) if error.kind() == ErrorKind::TimedOut => {
                silent.push((host, format!("no answer within {} s", ANSWER.as_secs())));
            }
            Err(error) => silent.push((host, format!("{remote_shell}: {error}"))),
        }
    }
    (there, silent)
}

/// What has failed so far.
struct History {
    budget: u32,
    /// Restarts that were decided on.
    starts: u32,
    pause: Duration,
    last: Option<Ending>,
    /// How often in a row `last` has come.
    repeated: u32,
}

impl History {
    fn new(budget: u32) -> History {
        History { budget, starts: 0, pause: FIRST_PAUSE, last: None, repeated: 0 }
    }

    fn saved_step(&self) -> Option<u64> {
        self.last.as_ref().and_then(|last| last.saved_step)
    }

    /// The pause before the next start after a run; or the end, with a reason where there was a budget.
    fn after(&mut self, mut ending: Ending) -> Result<Duration, Option<String>> {
        if ending.code != exit::FAILED || self.budget == 0 {
            return Err(None);
        }
        ending.saved_step = ending.saved_step.or(self.saved_step());
        self.repeated = if self.last.as_ref() == Some(&ending) { self.repeated + 1 } else { 1 };
        if self.saved_step() != ending.saved_step {
            self.pause = FIRST_PAUSE;
        }
        let cause = ending.cause.clone();
        self.last = Some(ending);
        if self.repeated >= HOPELESS {
            return Err(Some(format!(
                "the same failure {HOPELESS} times in a row {}: {cause}; not started again: mend its cause, then run the same command",
                self.place()
            )));
        }
        self.again(&cause)
    }

    /// The pause before the next start, whatever the last one came to.
    fn again(&mut self, cause: &str) -> Result<Duration, Option<String>> {
        if self.starts >= self.budget {
            let why = || format!("all {} restarts are used up; last failure, {}: {cause}", self.budget, self.place());
            return Err((self.budget > 0).then(why));
        }
        self.starts += 1;
        let pause = self.pause;
        self.pause = (2 * pause).min(LONGEST_PAUSE);
        Ok(pause)
    }

    fn place(&self) -> String {
        self.saved_step().map_or("before any checkpoint".to_owned(), |step| format!("after step {step}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(cause: &str, saved_step: Option<u64>) -> Ending {
        Ending { code: exit::FAILED, cause: cause.to_owned(), saved_step }
    }

    #[test]
    fn pauses_grow_until_there_is_a_new_checkpoint_and_the_budget_ends() {
        let mut history = History::new(6);
        let pauses: Vec<u64> = [("a", 5), ("b", 5), ("a", 5), ("a", 9), ("b", 9), ("c", 9)]
            .into_iter()
            .filter_map(|(cause, step)| Some(history.after(failed(cause, Some(step))).ok()?.as_secs()))
            .collect();
        assert_eq!(pauses, [1, 2, 4, 1, 2, 4]);
        let end = history.after(failed("d", None)).unwrap_err().unwrap();
        assert!(end.contains("all 6 restarts are used up") && end.contains("after step 9: d"), "{end}");
    }

    #[test]
    fn the_same_failure_thrice_is_the_end() {
        let mut history = History::new(100);
        let mut after = |cause, step| history.after(failed(cause, step));
        assert!(after("loss is NaN", Some(3)).is_ok() && after("loss is NaN", Some(3)).is_ok());
        assert!(after("loss is NaN", Some(6)).is_ok() && after("loss is NaN", Some(6)).is_ok());
        let end = after("loss is NaN", Some(6)).unwrap_err().unwrap();
        assert!(end.contains("3 times in a row after step 6: loss is NaN"), "{end}");
    }

    #[test]
    fn only_failures_are_tried_again_and_only_with_a_budget() {
        for code in [exit::OK, exit::RESUMABLE, exit::USAGE] {
            assert_eq!(History::new(5).after(Ending { code, ..failed("", None) }), Err(None));
        }
        assert_eq!(History::new(0).after(failed("a", None)), Err(None));
    }
}
