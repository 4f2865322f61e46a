//! From a URL to a store, and the text of URLs and errors without secrets.

use crate::{error::CheckpointError, store::StoreOptions};
use object_store::{
    BackoffConfig, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, http::HttpBuilder, local::LocalFileSystem,
    memory::InMemory, path::Path,
};
use std::{
    fs, io,
    path::{Path as FilePath, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};
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
    let bad = |reason: String| CheckpointError::BadUrl { url: redact(text), reason };
    let url = if text.contains("://") {
        Url::parse(text)
            .map_err(|e| bad(format!("{e}; expected file:///…, s3://…, gs://…, az://…, https://… or a path")))?
    } else {
        let path = std::path::absolute(text).map_err(|e| bad(e.to_string()))?;
        Url::from_file_path(path).map_err(|()| bad("expected an absolute path".to_owned()))?
    };
    if url.password().is_some() || url.query().is_some() {
        return Err(bad(
            "a password or a query in the URL would end in logs; pass credentials through the environment \
            (AWS_…, GOOGLE_…, AZURE_…)"
                .to_owned(),
        ));
    }
    let (scheme, root) = ObjectStoreScheme::parse(&url).map_err(|e| {
        bad(format!("{}; expected file:///…, s3://…, gs://…, az://…, https://… or a path", redact_text(&e.to_string())))
    })?;
    let shown = redact(url.as_str());
    let built = |e: object_store::Error| bad(redact_text(&e.to_string()));
    let store: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::Local => {
            let path = url.to_file_path().map_err(|()| bad("expected file:///absolute/path".to_owned()))?;
            prepare_folder(&path, folder, &shown)?;
            let store = LocalFileSystem::new_with_prefix(&path).map_err(built)?.with_fsync(true);
            return Ok(Location { store: Arc::new(store), root: Path::default(), url: shown, folder: Some(path) });
        }
        ObjectStoreScheme::Memory => Arc::clone(process_memory()) as _,
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::new().with_client_options(client(options)).with_retry(retry(options));
            let builder = environment("AWS_").fold(builder, |b, (key, value)| match key.parse() {
                Ok(key) => b.with_config(key, value),
                Err(_) => b,
            });
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder =
                GoogleCloudStorageBuilder::new().with_client_options(client(options)).with_retry(retry(options));
            let builder = environment("GOOGLE_").fold(builder, |b, (key, value)| match key.parse() {
                Ok(key) => b.with_config(key, value),
                Err(_) => b,
            });
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::new().with_client_options(client(options)).with_retry(retry(options));
            let builder = environment("AZURE_").fold(builder, |b, (key, value)| match key.parse() {
                Ok(key) => b.with_config(key, value),
                Err(_) => b,
            });
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        // Reads only: WebDAV has no create-if-absent in object_store, so claiming an attempt fails with that reason.
        ObjectStoreScheme::Http => {
            let host = &url[..url::Position::BeforePath];
            let builder = HttpBuilder::new().with_client_options(client(options).with_allow_http(true));
            Arc::new(builder.with_retry(retry(options)).with_url(host).build().map_err(built)?)
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

fn environment(prefix: &'static str) -> impl Iterator<Item = (String, String)> {
    let variables =
        std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    variables.filter(move |(key, _)| key.starts_with(prefix)).map(|(key, value)| (key.to_ascii_lowercase(), value))
}

/// Requests are bounded per operation in `backend`, by size; the client itself only notices dead peers.
fn client(options: &StoreOptions) -> ClientOptions {
    ClientOptions::new()
        .with_connect_timeout(options.op_timeout / 6)
        .with_read_timeout(options.op_timeout)
        .with_timeout(Duration::from_secs(24 * 3600))
}

/// Gives up well before the operation's own deadline, so that the error tells the cause and not only "too late".
fn retry(options: &StoreOptions) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: 32,
        retry_timeout: options.op_timeout / 2,
    }
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

/// `url` without user-info, query and fragment. What does not parse as a URL is treated as text.
pub(crate) fn redact(url: &str) -> String {
    redact_text(url)
}

/// `text` in which every URL has lost its user-info, query and fragment. Error messages of HTTP clients quote URLs,
/// and signed URLs carry their signature in the query.
pub(crate) fn redact_text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("://") {
        let (before, url) = rest.split_at(at + 3);
        out.push_str(before);
        let end = url
            .find(|c: char| c.is_whitespace() || matches!(c, '"' | '\'' | ')' | '>' | '`' | ','))
            .unwrap_or(url.len());
        let (url, after) = url.split_at(end);
        let (kept, had_query) = match url.find(['?', '#']) {
            Some(cut) => (&url[..cut], true),
            None => (url, false),
        };
        let authority_end = kept.find('/').unwrap_or(kept.len());
        let (authority, path) = kept.split_at(authority_end);
        out.push_str(authority.rsplit('@').next().unwrap_or(authority));
        out.push_str(path);
        if had_query {
            let closing = url.trim_end_matches(['.', ':', ';']).len();
            out.push_str(&url[closing..]);
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn secrets_leave_urls_and_messages() {
        assert_eq!(redact("s3://key:secret@bucket/run?token=1#x"), "s3://bucket/run");
        assert_eq!(redact("file:///a/b"), "file:///a/b");
        assert_eq!(
            redact_text("sending to (https://u:p@h.net/c/k?sig=SECRET&x=1): refused, see http://x/y?z=SECRET"),
            "sending to (https://h.net/c/k): refused, see http://x/y"
        );
        assert_eq!(redact_text("no url here"), "no url here");
    }

    #[test]
    fn credentials_in_a_url_are_refused_without_being_shown() {
        for url in ["https://me:SECRET@host/run", "https://account.blob.core.windows.net/c/run?sig=SECRET"] {
            let error = open(url, Folder::Create, &StoreOptions::default()).err().unwrap().to_string();
            assert!(!error.contains("SECRET") && error.contains("environment"), "{error}");
        }
    }
}
