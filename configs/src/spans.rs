//! What the threads of this process are at, for a trace of a few steps of a run.
//!
//! Recording is off until [`begin`]; then a span costs one load of a flag. [`end`] gives what was recorded since.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::phases::{self, Phase};

/// The most spans that are kept; later ones are only counted.
const MAX_SPANS: usize = 200_000;

/// What a span was spent on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Track {
    /// The step loop. Its spans lie within each other.
    Compute,
    /// Operations of the collective, from their start until the backend saw their end.
    Wire,
    /// Threads that read and decode.
    Data,
    /// Checkpoints on their way to the store.
    Saver,
}

/// Something that took time.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// What it was spent on.
    pub track: Track,
    /// What was done.
    pub name: &'static str,
    /// Of which step, lane, bucket …, where there are several.
    pub number: Option<u64>,
    /// Begin.
    pub begin: Instant,
    /// End.
    pub end: Instant,
}

/// What was recorded.
#[derive(Debug, Default)]
pub struct Recorded {
    /// In the order of their ends.
    pub spans: Vec<Span>,
    /// Those beyond the most that are kept.
    pub dropped: u64,
}

static ON: AtomicBool = AtomicBool::new(false);
static RECORDED: Mutex<Recorded> = Mutex::new(Recorded { spans: Vec::new(), dropped: 0 });

fn recorded() -> MutexGuard<'static, Recorded> {
    RECORDED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to record, with nothing from before.
pub fn begin() {
    *recorded() = Recorded::default();
    ON.store(true, Ordering::Relaxed);
}

/// Ends recording. Spans that have not ended are left out.
pub fn end() -> Recorded {
    ON.store(false, Ordering::Relaxed);
    std::mem::take(&mut *recorded())
}

/// A span from now until the value is dropped.
#[must_use = "the span ends when this is dropped"]
pub fn span(track: Track, name: &'static str, number: impl Into<Option<u64>>) -> Open {
    let span = ON.load(Ordering::Relaxed).then(|| (track, name, number.into(), Instant::now()));
    Open { span, outer: None }
}

/// A span of the step loop that is a phase of the run, for [`phases`]; the one around it goes on when it ends.
#[must_use = "the span ends when this is dropped"]
pub fn phase(phase: Phase, name: &'static str, number: impl Into<Option<u64>>) -> Open {
    let mut open = span(Track::Compute, name, number);
    open.outer = phases::enter(phase);
    open
}

/// A span whose times are known.
pub fn record(track: Track, name: &'static str, number: impl Into<Option<u64>>, begin: Instant, end: Instant) {
    if ON.load(Ordering::Relaxed) {
        keep(Span { track, name, number: number.into(), begin, end });
    }
}

fn keep(span: Span) {
    let mut recorded = recorded();
    if recorded.spans.len() < MAX_SPANS {
        recorded.spans.push(span);
    } else {
        recorded.dropped += 1;
    }
}

/// A span that has not ended; see [`span`] and [`phase`].
pub struct Open {
    span: Option<(Track, &'static str, Option<u64>, Instant)>,
    /// The phase around it.
    outer: Option<Phase>,
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some((track, name, number, begin)) = self.span.take() {
            record(track, name, number, begin, Instant::now());
        }
        self.outer.take().map(phases::enter);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The recorder is the process's: one test.
    #[test]
    fn spans_are_recorded_between_begin_and_end_only_and_within_bounds() {
        drop(span(Track::Compute, "before", None));
        begin();
        let outer = span(Track::Compute, "step", 7);
        drop(span(Track::Data, "read", None));
        drop(outer);
        let open = span(Track::Saver, "still open", None);
        let found = end();
        drop(open);
        let names: Vec<_> = found.spans.iter().map(|span| (span.name, span.number)).collect();
        assert_eq!(names, [("read", None), ("step", Some(7))]);
        assert!(found.spans[1].begin <= found.spans[0].begin && found.spans[0].end <= found.spans[1].end);

        begin();
        let now = Instant::now();
        (0..MAX_SPANS as u64 + 3).for_each(|i| record(Track::Wire, "reduce", i, now, now));
        let found = end();
        assert_eq!((found.spans.len(), found.dropped), (MAX_SPANS, 3));
        assert!(end().spans.is_empty());
    }
}
