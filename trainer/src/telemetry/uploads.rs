//! Uploads of a growing folder, on a thread of their own: the training loop never waits for a store.

use super::run_files::{RunFilesError, failed};
use configs::location::redact;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};

/// Longest time for one upload of a log or image.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the end of the run waits for the last uploads.
const END_TIMEOUT: Duration = Duration::from_secs(60);

/// A thread that uploads what has changed in a folder whenever it is asked to, and once more at the end.
pub(super) struct Uploads {
    /// Holds one: what is asked while an upload runs is done by the next one.
    asked: Option<SyncSender<()>>,
    ended: Receiver<()>,
}

impl Uploads {
    /// To the run folder at `url`, from `folder`, to which the files in `continued` are brought first.
    ///
    /// # Errors
    /// A URL that cannot be used or read, or no thread.
    pub(super) fn start(url: &str, folder: &Path, continued: &[&str]) -> Result<Self, RunFilesError> {
        let remote = Remote::open(url, folder.to_owned())?;
        remote.fetch(continued)?;
        let shown = remote.url.clone();
        let (asked, requests) = sync_channel(1);
        let (end, ended) = channel();
        let work = move || {
            // Gone when the thread is, which is what it tells.
            let _end = end;
            remote.serve(&requests);
        };
        let thread = std::thread::Builder::new().name("run-files".to_owned()).spawn(work);
        thread.map_err(|error| failed(&shown, error))?;
        Ok(Self { asked: Some(asked), ended })
    }

    /// Has what is there now uploaded soon.
    pub(super) fn ask(&self) {
        if let Some(asked) = &self.asked {
            // Full: somebody has asked already, and what is there now will be seen.
            let _ = asked.try_send(());
        }
    }
}

impl Drop for Uploads {
    fn drop(&mut self) {
        drop(self.asked.take());
        if self.ended.recv_timeout(END_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
            eprintln!("trainer: warning: the end of the log was not uploaded within {} s", END_TIMEOUT.as_secs());
        }
    }
}

struct Remote {
    folder: PathBuf,
    store: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    runtime: Runtime,
    url: String,
    /// Length of each file at its last upload.
    uploaded: BTreeMap<String, usize>,
}

impl Remote {
    fn open(url: &str, folder: PathBuf) -> Result<Self, RunFilesError> {
        let shown = redact(url);
        let refused = |error: &dyn std::fmt::Display| failed(&shown, error);
        let parsed = url::Url::parse(url).map_err(|error| refused(&error))?;
        let (store, prefix) = stores::open(&parsed, stores::Bounds::default()).map_err(|error| refused(&error))?;
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|error| refused(&error))?;
        Ok(Self { folder, store, prefix, runtime, url: shown, uploaded: BTreeMap::new() })
    }

    fn fetch(&self, names: &[&str]) -> Result<(), RunFilesError> {
        for name in names {
            let earlier = self.runtime.block_on(async {
                match self.store.get(&self.path(name)).await {
                    Ok(found) => found.bytes().await.map(Some),
                    Err(object_store::Error::NotFound { .. }) => Ok(None),
                    Err(error) => Err(error),
                }
            });
            let path = self.folder.join(name);
            if let Some(bytes) = earlier.map_err(|error| failed(&self.url, error))? {
                fs::write(&path, bytes).map_err(|error| failed(&path, error))?;
            }
        }
        Ok(())
    }

    /// The files are no part of the run's state: what cannot be uploaded now is uploaded next time, with a warning.
    fn serve(mut self, requests: &Receiver<()>) {
        loop {
            let is_last = requests.recv().is_err();
            if let Err(error) = self.upload() {
                eprintln!("trainer: warning: the log was not uploaded: {error}");
            }
            if is_last {
                // Dropping the runtime would wait for what hangs.
                return self.runtime.shutdown_background();
            }
        }
    }

    /// Uploads what has grown since the last time.
    fn upload(&mut self) -> Result<(), RunFilesError> {
        let mut files = Vec::new();
        list(&self.folder, "", &mut files).map_err(|error| failed(&self.folder, error))?;
        for (name, length) in files {
            if self.uploaded.get(&name) == Some(&length) {
                continue;
            }
            let bytes = fs::read(self.folder.join(&name)).map_err(|error| failed(&self.folder, error))?;
            let (path, length) = (self.path(&name), bytes.len());
            let put = self.store.put(&path, PutPayload::from(bytes));
            let put = self.runtime.block_on(async { tokio::time::timeout(UPLOAD_TIMEOUT, put).await });
            let put = put.map_err(|_| failed(&self.url, format!("`{name}` took longer than {UPLOAD_TIMEOUT:?}")))?;
            put.map_err(|error| failed(&self.url, error))?;
            self.uploaded.insert(name, length);
        }
        Ok(())
    }

    fn path(&self, name: &str) -> ObjectPath {
        name.split('/').fold(self.prefix.clone(), |path, part| path.join(part))
    }
}

fn list(folder: &Path, prefix: &str, files: &mut Vec<(String, usize)>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            list(&entry.path(), &format!("{name}/"), files)?;
        } else {
            files.push((name, entry.metadata()?.len() as usize));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;

    #[test]
    fn a_store_that_never_answers_holds_nobody_up() {
        // Takes connections and says nothing.
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/run", server.local_addr().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let uploads = Uploads::start(&url, folder.path(), &[]).unwrap();
        let mut log = fs::File::create(folder.path().join("log.jsonl")).unwrap();
        // Far more than would fit if each waited for an answer; the first is under way, one more is remembered.
        for line in 0..10_000 {
            writeln!(log, "{line}").unwrap();
            uploads.ask();
        }
        assert!(uploads.ended.try_recv().is_err_and(|error| error == std::sync::mpsc::TryRecvError::Empty));
        // Not dropped, which would wait for the last upload as long as the end of a run does.
        std::mem::forget(uploads);
    }

    #[test]
    fn what_has_grown_is_there_at_the_end_and_is_continued() {
        let url = format!("memory:///uploads-{}", std::process::id());
        let folder = tempfile::tempdir().unwrap();
        // Each `open` of a memory store is a store of its own, so the thread's part is done here.
        let mut remote = Remote::open(&url, folder.path().to_owned()).unwrap();
        fs::create_dir(folder.path().join("samples")).unwrap();
        fs::write(folder.path().join("log.jsonl"), "1\n").unwrap();
        remote.upload().unwrap();
        fs::write(folder.path().join("log.jsonl"), "1\n2\n").unwrap();
        fs::write(folder.path().join("samples/a.png"), "png").unwrap();
        let (asked, requests) = sync_channel::<()>(1);
        drop(asked);
        let (store, prefix) = (remote.store.clone(), remote.prefix.clone());
        remote.serve(&requests);
        let again = tempfile::tempdir().unwrap();
        let mut next = Remote::open(&url, again.path().to_owned()).unwrap();
        (next.store, next.prefix) = (store, prefix);
        next.fetch(&["log.jsonl", "samples/none"]).unwrap();
        assert_eq!(fs::read_to_string(again.path().join("log.jsonl")).unwrap(), "1\n2\n");
        let image = next.runtime.block_on(async { next.store.get(&next.path("samples/a.png")).await });
        assert!(image.is_ok());
    }
}
