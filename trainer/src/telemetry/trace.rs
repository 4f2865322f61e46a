use crate::engine::agree::decided_by_rank_0;
use anyhow::{Context, Result};
use collective::{Collective, Region};
use configs::spans::{self, Recorded, Span, Track};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::PathBuf;
use std::time::Instant;

/// Options of a trace.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct TraceArgs {
    /// Write what all ranks did, and when, into this file of rank 0, for Perfetto (ui.perfetto.dev) or chrome://tracing. A copy
    /// with the attempt's number in its name stays when a later start writes the file anew.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Steps to trace, the first ones of this start.
    #[arg(long, value_name = "N", default_value_t = 20, requires = "trace", value_parser = clap::value_parser!(u64).range(1..=10_000))]
    trace_steps: u64,
}

/// A trace of the first steps of a start in Chrome's format, a JSON array: a process a rank, a thread a kind of work (more where
/// that overlaps itself).
pub struct Trace {
    path: PathBuf,
    /// Rank 0's.
    file: Option<File>,
    /// All ranks were here together; times count from here.
    origin: Instant,
    /// Steps that are asked for.
    steps: u64,
    last_step: u64,
    /// This start's number, once it has one.
    attempt: Option<u32>,
}

impl Trace {
    /// Begins to record if that is asked for. All ranks call it together, before anything else that is worth seeing.
    ///
    /// # Errors
    /// [`Agreed`](crate::engine::agree::Agreed) where the file cannot be written, and what the collective reports.
    pub fn begin(args: &TraceArgs, collective: &dyn Collective) -> Result<Option<Self>> {
        let Some(path) = args.trace.clone() else { return Ok(None) };
        let mut file = None;
        decided_by_rank_0(collective, || {
            let create = File::create(&path).with_context(|| format!("--trace: {} cannot be written", path.display()));
            create.map(|created| file = Some(created))
        })?;
        collective.barrier()?;
        spans::begin();
        Ok(Some(Self { path, file, origin: Instant::now(), steps: args.trace_steps, last_step: 0, attempt: None }))
    }

    /// The trace is of the first steps of `attempt`, which goes on after step `done`; what was recorded before stays in it.
    pub fn of_attempt(&mut self, attempt: u32, done: u64) {
        (self.attempt, self.last_step) = (Some(attempt), self.steps.saturating_add(done));
    }

    /// Whether `step` is the last one of the trace.
    pub fn is_complete(&self, step: u64) -> bool {
        step >= self.last_step
    }

    /// Ends recording and writes what all ranks have. All ranks call it together. A file that cannot be written ends nothing.
    ///
    /// # Errors
    /// What the collective reports.
    pub fn write(mut self, collective: &dyn Collective) -> Result<()> {
        let rank = collective.rank();
        let text = self.recorded(rank);
        let lengths = collective.gather_values(vec![text.len() as i64]).context("collecting the trace")?;
        let mut file = self.file.take().map(BufWriter::new);
        let mut written = Ok(());
        // One rank after the other: nobody holds more than one other rank's.
        for (from, length) in lengths.into_iter().enumerate() {
            let buffer = if from == rank { text.clone() } else { vec![0; length as usize] };
            let sent = collective.broadcast(Region::from_vec(buffer), from)?.wait(collective.deadline())?;
            if let Some(file) = &mut file {
                let part = sent.into_vec::<u8>()?;
                let before: &[u8] = if from == 0 { b"[\n" } else { b",\n" };
                written = written.and_then(|()| file.write_all(before)).and_then(|()| file.write_all(&part));
            }
        }
        if let Some(mut file) = file {
            written = written.and_then(|()| file.write_all(b"\n]\n")).and_then(|()| file.flush());
            if self.attempt.is_some() && self.path.is_file() {
                written = written.and_then(|()| fs::copy(&self.path, self.numbered("")).map(drop));
            }
        }
        if let Err(error) = written {
            eprintln!("trainer: warning: --trace: {} was not written: {error}", self.path.display());
        }
        Ok(())
    }

    /// Ends recording and writes what this rank has into a file of its own: for a failure that the other ranks may not know of.
    pub fn write_alone(self, rank: usize) {
        let path = self.numbered(&format!(".rank-{rank}"));
        let text = [b"[\n", self.recorded(rank).as_slice(), b"\n]\n"].concat();
        if let Err(error) = fs::write(&path, text) {
            eprintln!("trainer: warning: rank {rank}: --trace: {} was not written: {error}", path.display());
        }
    }

    /// What `rank` has recorded, as text.
    fn recorded(&self, rank: usize) -> Vec<u8> {
        let recorded = spans::end();
        if recorded.dropped > 0 {
            eprintln!("trainer: warning: rank {rank}: --trace: {} spans left out at the end", recorded.dropped);
        }
        let events: Vec<String> = events(rank, self.origin, &recorded).iter().map(Value::to_string).collect();
        events.join(",\n").into_bytes()
    }

    /// `trace.json` as `trace.attempt-0003.json`, with `further` after the number.
    fn numbered(&self, further: &str) -> PathBuf {
        let extension = self.path.extension().map(|extension| format!(".{}", extension.display())).unwrap_or_default();
        let attempt = self.attempt.map(|attempt| format!(".attempt-{attempt:04}")).unwrap_or_default();
        self.path.with_extension(format!("{}{further}{extension}", attempt).trim_start_matches('.'))
    }
}

/// The events of one rank.
fn events(rank: usize, origin: Instant, recorded: &Recorded) -> Vec<Value> {
    let about =
        |kind: &str, tid: usize, args: Value| json!({"ph": "M", "pid": rank, "tid": tid, "name": kind, "args": args});
    let mut events = vec![about("process_name", 0, json!({"name": format!("rank {rank}")}))];
    for (index, (track, name)) in
        [(Track::Compute, "compute"), (Track::Wire, "wire"), (Track::Data, "data"), (Track::Saver, "saver")]
            .into_iter()
            .enumerate()
    {
        let mut spans: Vec<&Span> = recorded.spans.iter().filter(|span| span.track == track).collect();
        spans.sort_by_key(|span| (span.begin, std::cmp::Reverse(span.end)));
        let mut rows = Rows::default();
        for span in spans {
            // Those of the step loop lie within each other, which one row shows.
            let row = if track == Track::Compute { 0 } else { rows.of(span) };
            let tid = index * 1000 + row;
            if row >= rows.named {
                rows.named = row + 1;
                let name = if row == 0 { name.to_owned() } else { format!("{name} {}", row + 1) };
                events.push(about("thread_name", tid, json!({ "name": name })));
                events.push(about("thread_sort_index", tid, json!({ "sort_index": tid })));
            }
            let begin = span.begin.max(origin);
            let micros = |from: Instant, to: Instant| to.saturating_duration_since(from).as_nanos() as f64 / 1e3;
            let title = span.number.map_or(span.name.to_owned(), |number| format!("{} {number}", span.name));
            events.push(json!({
                "ph": "X", "pid": rank, "tid": tid, "cat": name, "name": title,
                "ts": micros(origin, begin), "dur": micros(begin, span.end),
            }));
        }
    }
    events
}

/// Rows of spans that do not overlap.
#[derive(Default)]
struct Rows {
    free_from: Vec<Instant>,
    named: usize,
}

impl Rows {
    /// The first row that is free for `span`, which begins no earlier than those before it.
    fn of(&mut self, span: &Span) -> usize {
        let free = self.free_from.iter().position(|end| *end <= span.begin);
        let row = free.unwrap_or(self.free_from.len());
        match self.free_from.get_mut(row) {
            Some(end) => *end = span.end,
            None => self.free_from.push(span.end),
        }
        row
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn spans_that_overlap_are_in_rows_of_their_own_and_times_count_from_the_origin() {
        let origin = Instant::now() + Duration::from_secs(1);
        let at = |us| origin + Duration::from_micros(us);
        let span = |track, name, begin, end| Span { track, name, number: Some(2), begin, end };
        let early = origin - Duration::from_millis(1);
        let spans = vec![
            span(Track::Wire, "reduce", at(10), at(30)),
            span(Track::Wire, "gather", early, at(12)),
            span(Track::Wire, "reduce", at(12), at(14)),
            span(Track::Compute, "forward", at(1), at(2)),
            span(Track::Compute, "step", at(0), at(9)),
        ];
        let events = events(3, origin, &Recorded { spans, dropped: 0 });
        let found: Vec<_> = events.iter().filter(|event| event["ph"] == "X").collect();
        let shown =
            |event: &&Value| (event["name"].clone(), event["tid"].clone(), event["ts"].clone(), event["dur"].clone());
        let expected = [
            ("step 2", 0, 0., 9.),
            ("forward 2", 0, 1., 1.),
            ("gather 2", 1000, 0., 12.),
            ("reduce 2", 1001, 10., 20.),
            ("reduce 2", 1000, 12., 2.),
        ];
        let expected = expected.map(|(name, tid, ts, dur)| (json!(name), json!(tid), json!(ts), json!(dur)));
        assert_eq!(found.iter().map(shown).collect::<Vec<_>>(), expected);
        let names: Vec<_> =
            events.iter().filter(|event| event["name"] == "thread_name").map(|event| &event["args"]["name"]).collect();
        assert_eq!(names, ["compute", "wire", "wire 2"]);
        assert!(found.iter().all(|event| event["pid"] == 3));
    }
}
