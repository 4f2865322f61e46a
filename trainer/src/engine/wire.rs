//! How gradients cross the wire, and what of that the step loop had to wait for.

use collective::{CollectiveError, Pending};
use configs::phases::Phase;
use configs::spans::{self, Track};
use configs::{Reduction, ReductionDtype, RunConfig};
use std::time::{Duration, Instant};
use tch::Kind;

/// How the ranks' sums of gradients become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summation {
    /// All sums are moved to the owner of the shard, who ends the canonical tree: the same bits on any number of ranks.
    Tree,
    /// The backend adds them on the way, in numbers of this kind: the same bits on the same number of ranks.
    Backend(Kind),
}

impl Summation {
    /// As the config asks.
    pub fn of_config(config: &RunConfig) -> Self {
        match (config.reduction, config.reduction_dtype) {
            (Reduction::Invariant, _) => Self::Tree,
            (Reduction::Fast, ReductionDtype::Fp32) => Self::Backend(Kind::Float),
            (Reduction::Fast, ReductionDtype::Bf16) => Self::Backend(Kind::BFloat16),
        }
    }
}

/// Times of operations that moved gradients or weights.
#[derive(Default)]
pub struct WireClock {
    spans: Vec<(Instant, Instant)>,
    waited: Duration,
}

/// What came together in a [`WireClock`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WireTime {
    /// At least one operation was under way. The time that other ranks took to come to it is in it.
    pub busy: Duration,
    /// The step loop waited for one.
    pub waited: Duration,
}

impl WireTime {
    /// The share of the busy time that the step loop did something else; `None` where nothing was on the wire.
    pub fn overlap(&self) -> Option<f64> {
        let share = 1.0 - self.waited.as_secs_f64() / self.busy.as_secs_f64();
        share.is_finite().then(|| share.max(0.0))
    }
}

impl std::ops::AddAssign for WireTime {
    fn add_assign(&mut self, other: Self) {
        self.busy += other.busy;
        self.waited += other.waited;
    }
}

impl WireClock {
    /// Waits for an operation on bucket `index`; `name` is what a trace calls it.
    ///
    /// # Errors
    /// See [`Pending::wait`].
    pub fn wait(
        &mut self,
        pending: Pending,
        deadline: Duration,
        name: &'static str,
        index: usize,
    ) -> Result<(), CollectiveError> {
        let asked = Instant::now();
        let done = {
            let _waiting = spans::phase(Phase::Reduce, "wait for the wire", index as u64);
            pending.wait_timed(deadline)?
        };
        self.waited += asked.elapsed();
        self.spans.push((done.started, done.ended));
        spans::record(Track::Wire, name, index as u64, done.started, done.ended);
        Ok(())
    }

    /// What came together since this was last asked.
    pub fn take(&mut self) -> WireTime {
        self.spans.sort_unstable();
        let mut busy = Duration::ZERO;
        let mut until: Option<Instant> = None;
        for (started, ended) in self.spans.drain(..) {
            let from = until.map_or(started, |until| until.max(started));
            busy += ended.saturating_duration_since(from);
            until = Some(until.map_or(ended, |until| until.max(ended)));
        }
        WireTime { busy, waited: std::mem::take(&mut self.waited) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_at_the_same_time_count_once() {
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        // 0–10 with 2–4 in it and 8–15 across its end, then 20–25.
        let spans = vec![(at(20), at(25)), (at(0), at(10)), (at(8), at(15)), (at(2), at(4))];
        let mut clock = WireClock { spans, waited: Duration::from_millis(5) };
        let time = clock.take();
        assert_eq!((time.busy, time.waited), (Duration::from_millis(20), Duration::from_millis(5)));
        assert_eq!(time.overlap(), Some(0.75));
        assert_eq!((clock.take(), clock.take().overlap()), (WireTime::default(), None));
    }
}
