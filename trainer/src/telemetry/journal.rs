use super::run_files::{RunFiles, RunFilesError};
use super::tensorboard::TensorBoard;
use configs::events::{Event, is_launcher_listening};
use std::fs::File;
use std::io::Write;

/// Where events of a run go.
pub trait LogSink: Send {
    /// Takes an event.
    ///
    /// # Errors
    /// [`RunFilesError`] when it cannot be kept.
    fn event(&mut self, event: &Event) -> Result<(), RunFilesError>;

    /// Takes an image, PNG encoded, of `size` (width, height); ignored by sinks of text.
    ///
    /// # Errors
    /// [`RunFilesError`] when it cannot be kept.
    fn image(&mut self, _step: u64, _tag: &str, _png: &[u8], _size: (usize, usize)) -> Result<(), RunFilesError> {
        Ok(())
    }
}

/// `log.jsonl` in the run folder: one JSON object a line, appended by every attempt.
struct JsonLines(File);

/// Lines on stdout: JSON when the launcher reads them, plain text otherwise.
struct Stdout {
    json: bool,
}

/// All sinks of a run; only rank 0 has one.
pub struct Journal {
    files: RunFiles,
    sinks: Vec<Box<dyn LogSink>>,
}

/// The log's name in the run folder.
const LOG: &str = "log.jsonl";

impl Journal {
    /// Opens the sinks of `attempt`, which continues after step `done`, in the run folder at `url`.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn open(url: &str, attempt: u32, done: u64, tensorboard: bool) -> Result<Self, RunFilesError> {
        let files = RunFiles::open(url, &[LOG])?;
        let json = is_launcher_listening();
        let mut sinks: Vec<Box<dyn LogSink>> = vec![Box::new(JsonLines::open(&files)?), Box::new(Stdout { json })];
        if tensorboard {
            sinks.push(Box::new(TensorBoard::create(&files, attempt, done)?));
        }
        Ok(Self { files, sinks })
    }

    /// Tells every sink.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn event(&mut self, event: &Event) -> Result<(), RunFilesError> {
        self.sinks.iter_mut().try_for_each(|sink| sink.event(event))
    }

    /// Keeps a PNG under `name` in the run folder, shows it to every sink under `tag` and gives its place.
    ///
    /// # Errors
    /// [`RunFilesError`].
    pub fn image(
        &mut self,
        step: u64,
        name: &str,
        tag: &str,
        png: &[u8],
        size: (usize, usize),
    ) -> Result<String, RunFilesError> {
        self.sinks.iter_mut().try_for_each(|sink| sink.image(step, tag, png, size))?;
        self.files.write(name, png)
    }

    /// Has a remote run folder brought up to date beside the training.
    pub fn sync(&self) {
        self.files.sync();
    }
}

impl JsonLines {
    /// A process that died while writing may have left half a line; the next one starts on a line of its own.
    fn open(files: &RunFiles) -> Result<Self, RunFilesError> {
        let mut file = files.append(LOG)?;
        if !files.ends_with_newline(LOG)? {
            file.write_all(b"\n").map_err(|error| RunFilesError::of(LOG, error))?;
        }
        Ok(Self(file))
    }
}

impl LogSink for JsonLines {
    fn event(&mut self, event: &Event) -> Result<(), RunFilesError> {
        // One write a line: a process that is killed leaves at most one broken last line.
        let line = event.to_line() + "\n";
        self.0.write_all(line.as_bytes()).map_err(|error| RunFilesError::of(LOG, error))
    }
}

impl LogSink for Stdout {
    fn event(&mut self, event: &Event) -> Result<(), RunFilesError> {
        let line = if self.json { event.to_line() } else { event.to_string() };
        // A reader that has gone away must not stop the run.
        let _ = writeln!(std::io::stdout(), "{line}");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_a_dead_process_left_half_written_does_not_swallow_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let whole = Event::Done { step: 1, time: 0.0 }.to_line();
        std::fs::write(folder.path().join(LOG), format!("{whole}\n{}", &whole[..9])).unwrap();
        let mut journal = Journal::open(folder.path().to_str().unwrap(), 2, 1, false).unwrap();
        journal.event(&Event::Done { step: 2, time: 0.0 }).unwrap();
        let log = std::fs::read_to_string(folder.path().join(LOG)).unwrap();
        let steps: Vec<_> = log.lines().filter_map(Event::parse).collect();
        assert_eq!(steps, [1, 2].map(|step| Event::Done { step, time: 0.0 }), "{log}");
    }
}
