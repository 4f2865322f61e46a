//! Steps that diverge: what all ranks have agreed on in a step is judged before the step counts as made, and by the same rule on
//! every rank. What the rule looks at is the same for any number of ranks, before and after a resume.

use super::decisions::DecisionLog;
use checkpoint::Manifest;
use configs::events::{Event, LaneAtFault, now};
use configs::{DivergenceConfig, OnDivergence};
use std::collections::VecDeque;
use std::fmt::{Display, Formatter};
use tch::Tensor;

/// What the ranks were at when a loss was computed.
const FORWARD: &str = "forward";
/// And a gradient.
const BACKWARD: &str = "backward";

/// What all ranks know of a step.
pub struct Observed<'a> {
    /// Which, from 1.
    pub step: u64,
    /// Loss of each lane; `None` where the decision log leaves it out.
    pub losses: &'a [Option<f64>],
    /// Mean over the lanes that count.
    pub loss: f64,
    /// The segment whose mean gradient is not finite, by its first parameter.
    pub broken_gradient: Option<&'a str>,
}

/// A step that has diverged, and what becomes of it; the same on every rank.
#[derive(Clone, Debug)]
pub struct Diverged {
    /// Which.
    pub step: u64,
    /// What the ranks were at.
    pub phase: &'static str,
    /// What is wrong; it names no rank.
    pub reason: String,
    /// The lanes at fault, as far as they are known; ranks and hosts are still to be filled in.
    pub lanes: Vec<LaneAtFault>,
    /// What becomes of the step.
    pub action: OnDivergence,
    /// Why the run ends all the same, if it does.
    pub evidence: String,
}

/// Watches over the losses and gradients of a run.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    config: DivergenceConfig,
    /// Losses of the newest steps that made an update, as far as a leap is measured by them. They are float32 so that they
    /// are the same after a trip through a manifest.
    losses: VecDeque<f32>,
}

impl Guard {
    /// One that goes on where the run of `resumed` was.
    pub fn of(config: &DivergenceConfig, resumed: Option<&Manifest>) -> Self {
        let recorded = resumed.map(|manifest| manifest.recent_losses.as_slice()).unwrap_or_default();
        let mut guard = Self { config: config.clone(), losses: VecDeque::new() };
        recorded.iter().for_each(|loss| guard.made(*loss));
        guard
    }

    /// What the next start has to know, for the manifest.
    pub fn losses(&self) -> Vec<f64> {
        self.losses.iter().map(|loss| f64::from(*loss)).collect()
    }

    /// Whether a step that has diverged may be left without an update while the run goes on from the weights that are there.
    pub(super) fn may_skip(&self) -> bool {
        self.config.policy == OnDivergence::Skip
    }

    /// A step of this loss has made an update.
    pub(super) fn made(&mut self, loss: f64) {
        if self.config.loss_spike.is_none() {
            return;
        }
        self.losses.push_back((loss as f32).clamp(f32::MIN, f32::MAX));
        while self.losses.len() > self.config.window {
            self.losses.pop_front();
        }
    }

    /// Judges a step. If it has diverged, what becomes of it is in `log` from here on.
    pub(super) fn judge(&self, of: &Observed, log: &mut DecisionLog) -> Option<Diverged> {
        let mut diverged = self.fault(of)?;
        let Diverged { step, ref reason, ref lanes, .. } = diverged;
        let (counting, at_fault) = (of.losses.iter().flatten().count(), lanes.iter().map(|lane| lane.lane).collect());
        diverged.action = self.config.policy;
        match diverged.action {
            OnDivergence::Stop => return Some(diverged),
            // With no lane left, or none known, there is nothing to make an update of.
            OnDivergence::Rollback if (1..counting).contains(&lanes.len()) => log.leave_out(step, at_fault, reason),
            OnDivergence::Skip | OnDivergence::Rollback => log.skip(step, reason),
        }
        let DivergenceConfig { window, budget, .. } = self.config;
        let exceptions = log.exceptions_after(step.saturating_sub(window as u64));
        if exceptions.len() > budget {
            let shown: Vec<String> =
                exceptions.iter().map(|(step, reason)| format!("step {step} ({reason})")).collect();
            diverged.action = OnDivergence::Stop;
            diverged.evidence = format!(
                "; within `divergence.window` = {window} steps `divergence.budget` allows {budget} exceptions, and these are {}: {}",
                shown.len(),
                shown.join(", ")
            );
        }
        Some(diverged)
    }

    fn fault(&self, of: &Observed) -> Option<Diverged> {
        let lanes = |at_fault: &dyn Fn(f64) -> bool| -> Vec<LaneAtFault> {
            let counting = of.losses.iter().enumerate().filter_map(|(lane, loss)| Some((lane, (*loss)?)));
            let lane = |(lane, loss)| LaneAtFault { lane, loss, rank: 0, host: String::new() };
            counting.filter(|(_, loss)| at_fault(*loss)).map(lane).collect()
        };
        let diverged = |phase, what: String, lanes: Vec<LaneAtFault>| {
            let each = lanes.iter().map(|at| format!(", in lane {} {}", at.lane, at.loss as f32));
            let (reason, evidence) = (each.fold(what, |what, each| what + &each), String::new());
            Some(Diverged { step: of.step, phase, reason, lanes, action: OnDivergence::Stop, evidence })
        };
        let broken = lanes(&|loss| !loss.is_finite());
        if !broken.is_empty() {
            return diverged(FORWARD, "the loss is not finite".to_owned(), broken);
        }
        if let Some(name) = of.broken_gradient {
            return diverged(BACKWARD, format!("the gradient in the segment of `{name}` is not finite"), Vec::new());
        }
        let (factor, usual) = (self.config.loss_spike?, self.usual_loss()?);
        let limit = factor * usual;
        if of.loss <= limit {
            return None;
        }
        let (loss, usual, window) = (of.loss as f32, usual as f32, self.config.window);
        let what = format!("the loss leaps to {loss}, above {factor} times {usual}, the median of the last {window}");
        diverged(FORWARD, what, lanes(&|loss| loss > limit))
    }

    /// The lower median of the losses in a full window.
    fn usual_loss(&self) -> Option<f64> {
        if self.losses.len() < self.config.window {
            return None;
        }
        let mut losses: Vec<f32> = self.losses.iter().copied().collect();
        losses.sort_by(f32::total_cmp);
        losses.get((losses.len() - 1) / 2).copied().map(f64::from)
    }
}

impl Diverged {
    /// For the log.
    pub fn event(&self) -> Event {
        let action = match self.action {
            OnDivergence::Stop => "stop",
            OnDivergence::Skip => "skip",
            OnDivergence::Rollback => "rollback",
        };
        let Self { step, reason, lanes, .. } = self.clone();
        Event::Diverged { step, phase: self.phase.to_owned(), reason, lanes, action: action.to_owned(), time: now() }
    }
}

impl Display for Diverged {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Self { step, phase, reason, evidence, .. } = self;
        if let Some(LaneAtFault { rank, host, .. }) = self.lanes.first() {
            write!(f, "rank {rank}: host {host}, ")?;
        }
        write!(f, "step {step}, phase {phase}: {reason}; nothing of the step is kept{evidence}")
    }
}

/// Whether a lane counts in its step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts(pub bool);

impl Counts {
    /// The gradients of a lane as they enter the sum. Zeros of a lane that does not count are added like any others, so that
    /// the sum has the same bits wherever it is made.
    pub fn weigh(self, grads: Vec<Option<Tensor>>) -> Vec<Option<Tensor>> {
        if self.0 { grads } else { grads.into_iter().map(|grad| grad.map(|grad| grad.zeros_like())).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(policy: OnDivergence, budget: usize) -> Guard {
        let config = DivergenceConfig { policy, loss_spike: Some(3.0), window: 3, budget };
        Guard { config, losses: VecDeque::new() }
    }

    fn observed<'a>(step: u64, losses: &'a [Option<f64>]) -> Observed<'a> {
        let (loss, counting) = (losses.iter().flatten().sum::<f64>(), losses.iter().flatten().count());
        Observed { step, losses, loss: loss / counting as f64, broken_gradient: None }
    }

    #[test]
    fn a_loss_leaps_above_the_median_of_a_full_window_only() {
        let mut guard = guard(OnDivergence::Stop, 1);
        let leap = [Some(1.0), Some(30.0), None];
        let log = &mut DecisionLog::default();
        for loss in [1.0, 2.0, 1.5] {
            assert!(guard.judge(&observed(1, &leap), log).is_none());
            guard.made(loss);
        }
        assert!(guard.judge(&observed(4, &[Some(4.5), Some(4.5)]), log).is_none());
        let diverged = guard.judge(&observed(4, &leap), log).unwrap();
        assert_eq!(diverged.lanes.iter().map(|at| at.lane).collect::<Vec<_>>(), [1]);
        let says = "the loss leaps to 15.5, above 3 times 1.5, the median of the last 3, in lane 1 30";
        assert_eq!((&diverged.reason[..], diverged.phase), (says, "forward"));
        guard.made(7.0);
        assert_eq!(guard.losses(), [2.0, 1.5, 7.0]);
    }

    #[test]
    fn a_rollback_leaves_lanes_out_and_where_none_would_be_left_the_step() {
        let (guard, mut log) = (guard(OnDivergence::Rollback, 9), DecisionLog::default());
        let left = |log: &DecisionLog, step| (0..3).filter(|lane| log.counts(step, *lane).0).collect::<Vec<_>>();
        guard.judge(&observed(5, &[Some(1.0), Some(f64::NAN), Some(1.0)]), &mut log).unwrap();
        assert_eq!((left(&log, 5), left(&log, 6), log.skips(5)), (vec![0, 2], vec![0, 1, 2], false));
        // The same step again, with what is left.
        guard.judge(&observed(5, &[Some(f64::INFINITY), None, Some(1.0)]), &mut log).unwrap();
        assert_eq!((left(&log, 5), log.skips(5)), (vec![2], false));
        guard.judge(&observed(5, &[None, None, Some(f64::NAN)]), &mut log).unwrap();
        assert!(log.skips(5));
        let broken_gradient = Some("blocks.0.attn.qkv.weight");
        let gradient = Observed { broken_gradient, ..observed(7, &[Some(1.0); 3]) };
        assert_eq!(guard.judge(&gradient, &mut log).unwrap().phase, "backward");
        assert!(log.skips(7) && !log.skips(6));
    }

    #[test]
    fn one_exception_more_than_the_budget_within_the_window_ends_the_run() {
        let (guard, mut log) = (guard(OnDivergence::Skip, 2), DecisionLog::default());
        let broken = [Some(f64::NAN), Some(1.0)];
        let mut actions = [2, 3, 6, 7, 8].map(|step| guard.judge(&observed(step, &broken), &mut log).unwrap());
        let last = actions[4].to_string();
        assert!(actions[..4].iter().all(|diverged| diverged.action == OnDivergence::Skip), "{actions:?}");
        assert_eq!(actions[4].action, OnDivergence::Stop);
        for says in ["step 6 (the loss is not finite, in lane 0 NaN)", "step 7 (", "step 8 (", "allows 2 exceptions"] {
            assert!(last.contains(says), "{says}: {last}");
        }
        assert!(!last.contains("step 3"), "{last}");
        actions[4].lanes[0] = LaneAtFault { host: "n1".to_owned(), rank: 3, ..actions[4].lanes[0].clone() };
        assert!(actions[4].to_string().starts_with("rank 3: host n1, step 8, phase forward: the loss"), "{actions:?}");
    }
}
