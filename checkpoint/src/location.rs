//! From a URL to a run's place in a store.

use crate::{error::CheckpointError, store::StoreOptions};
use object_store::{ObjectStore, ObjectStoreScheme, local::LocalFileSystem, memory::InMemory, path::Path};
use std::{
    fs, io,
    path::{Path as FilePath, PathBuf},
    sync::{Arc, OnceLock},
};
use stores::redact_text;
use url::Url;

/// What to do about the folder of a `file://` URL.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Folder {
    /// Make it and prove that it can be written.
    Create,
    /// It must be there; nothing is written.
    Existing,
}

/// A store and the run's place in it.
pub(crate) struct Location {
    pub store: Arc<dyn ObjectStore>,
    pub root: Path,
    pub url: String,
    pub folder: Option<PathBuf>,
}

/// Opens the store of `text`, a URL or a local path. Credentials come from the environment only.
pub(crate) fn open(text: &str, folder: Folder, options: &StoreOptions) -> Result<Location, CheckpointError> {
    let bad = |reason: String| CheckpointError::BadUrl { url: redact_text(text), reason };
    let url = if text.contains("://") {
        Url::parse(text)
            .map_err(|e| bad(format!("{e}; expected file:///…, s3://…, gs://…, az://…, https://… or a path")))?
    } else {
        let path = std::path::absolute(text).map_err(|e| bad(e.to_string()))?;
        Url::from_file_path(path).map_err(|()| bad("expected an absolute path".to_owned()))?
    };
    stores::refuse_secrets(&url).map_err(|e| bad_store(text, e))?;
    let (scheme, root) = ObjectStoreScheme::parse(&url).map_err(|e| {
        bad(format!("{}; expected file:///…, s3://…, gs://…, az://…, https://… or a path", redact_text(&e.to_string())))
    })?;
    let shown = redact_text(url.as_str());
    let built = |e: object_store::Error| bad(redact_text(&e.to_string()));
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::Local => {
            let path = url.to_file_path().map_err(|()| bad("expected file:///absolute/path".to_owned()))?;
            prepare_folder(&path, folder, &shown)?;
            let store = LocalFileSystem::new_with_prefix(&path).map_err(built)?.with_fsync(true);
            return Ok(Location { store: Arc::new(store), root: Path::default(), url: shown, folder: Some(path) });
        }
        ObjectStoreScheme::Memory => Arc::clone(process_memory()) as _,
        // Web servers are read only: WebDAV has no create-if-absent in object_store, so claiming an attempt fails with that reason.
        ObjectStoreScheme::AmazonS3
        | ObjectStoreScheme::GoogleCloudStorage
        | ObjectStoreScheme::MicrosoftAzure
        | ObjectStoreScheme::Http => {
            let bounds = stores::Bounds { op_timeout: options.op_timeout };
            stores::remote(&url, bounds).map_err(|e| bad_store(text, e))?
        }
        other => return Err(bad(format!("stores of kind {other:?} are not supported"))),
    };
    Ok(Location { store, root, url: shown, folder: None })
}

/// All `memory://` URLs of a process share one store, so that a run can be opened twice; the path is the run.
fn process_memory() -> &'static Arc<InMemory> {
    static MEMORY: OnceLock<Arc<InMemory>> = OnceLock::new();
    MEMORY.get_or_init(Arc::default)
}

fn bad_store(url: &str, error: stores::StoreError) -> CheckpointError {
    let reason = match error {
        stores::StoreError::Url { reason, .. } => reason,
        of_file => of_file.to_string(),
    };
    CheckpointError::BadUrl { url: redact_text(url), reason }
}

fn prepare_folder(path: &FilePath, folder: Folder, url: &str) -> Result<(), CheckpointError> {
    if folder == Folder::Existing {
        return match fs::metadata(path) {
            Ok(found) if found.is_dir() => Ok(()),
            Ok(_) => Err(CheckpointError::BadUrl {
                url: url.to_owned(),
                reason: "it is a file; expected the folder of a run".to_owned(),
            }),
            Err(e) => Err(CheckpointError::BadUrl {
                url: url.to_owned(),
                reason: format!("{e}; expected the folder of a run"),
            }),
        };
    }
    let unwritable = |what: String, e: io::Error| CheckpointError::Unwritable {
        url: url.to_owned(),
        reason: format!("{what}: {e}"),
    };
    create_synced(path).map_err(|e| unwritable(format!("creating {}", path.display()), e))?;
    let probe = path.join(format!(".writable-{}-{:016x}", std::process::id(), crate::attempt::random_u64()));
    let tried = fs::OpenOptions::new().write(true).create_new(true).open(&probe).and_then(|_| fs::remove_file(&probe));
    tried.map_err(|e| unwritable(format!("creating a file in {}", path.display()), e))
}

/// `create_dir_all`, with the entry of every new folder made durable in its parent.
fn create_synced(path: &FilePath) -> io::Result<()> {
    let new: Vec<&FilePath> = path.ancestors().take_while(|p| !p.exists()).collect();
    fs::create_dir_all(path)?;
    for made in new {
        if let Some(parent) = made.parent() {
            sync_folder(parent)?;
        }
    }
    Ok(())
}

/// Makes the entries of a folder durable.
pub(crate) fn sync_folder(path: &FilePath) -> io::Result<()> {
    if cfg!(unix) { fs::File::open(path)?.sync_all() } else { Ok(()) }
}
