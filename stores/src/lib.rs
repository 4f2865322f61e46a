//! From a URL to an object store, the same way for data sets, checkpoints and logs; and from an object to ranges of its bytes:
//! [`RangeReader`] asks for few large ones, tries again, and keeps what it has read in a [`BlockCache`] on disk;
//! [`SafetensorsHeader`] tells where in a file its tensors are.
//!
//! Credentials never come from URLs: they come from the environment (`AWS_…`, `GOOGLE_…`, `AZURE_…`) and, for S3, from the
//! profile files that other tools share (see [`profile`]). Only variables with a vendor's prefix are read: the stores also know
//! bare names such as `token`, which may mean anything in somebody's shell.

mod cache;
mod header;
mod object;
mod plan;
pub mod profile;
mod ranges;
mod redact;
mod retry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use cache::{BlockCache, CacheError};
pub use header::{MAX_HEADER_BYTES, SafetensorsHeader};
pub use object::Object;
pub use ranges::RangeReader;
pub use redact::redact_text;
pub use retry::{ReadError, ReadOptions};

use object_store::{
    BackoffConfig, Certificate, ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig, aws::AmazonS3Builder,
    azure::MicrosoftAzureBuilder, gcp::GoogleCloudStorageBuilder, http::HttpBuilder, path::Path,
};
use profile::Environment;
use std::{str::FromStr, sync::Arc, time::Duration};
use url::Url;

/// Bounds on a remote store's time.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Longest time for a small request, retries included. Connecting takes at most a sixth of it, a silence at most all of it.
    pub op_timeout: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { op_timeout: Duration::from_secs(30) }
    }
}

/// A URL or environment from which no store can be made. Shows no secrets.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The URL.
    #[error("{url}: {reason}")]
    Url {
        /// Without user-info and query.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A profile file or a certificate bundle.
    #[error("{file}: {reason}")]
    File {
        /// The file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Refuses what would end up in logs and errors: a password, a query or a fragment in the URL.
///
/// # Errors
/// [`StoreError::Url`].
pub fn refuse_secrets(url: &Url) -> Result<(), StoreError> {
    if url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(StoreError::Url {
            url: redact_text(url.as_str()),
            reason: "a password, a query or a fragment in the URL would end in logs; pass credentials through the \
                     environment (AWS_…, GOOGLE_…, AZURE_…) or a profile file"
                .to_owned(),
        });
    }
    Ok(())
}

/// The store of an `s3://`, `gs://`, `az://`, `http://` or `https://` URL; no request is made. Paths in it begin at the bucket,
/// the container or the host. A proxy is taken from `HTTPS_PROXY` and `HTTP_PROXY` or the vendor's `…_PROXY_URL`, further
/// certificate authorities from the PEM bundle that `AWS_CA_BUNDLE` or `SSL_CERT_FILE` names.
///
/// # Errors
/// [`StoreError`].
pub fn remote(url: &Url, bounds: Bounds) -> Result<Arc<dyn ObjectStore>, StoreError> {
    refuse_secrets(url)?;
    let refuse = |reason: String| StoreError::Url { url: redact_text(url.as_str()), reason: redact_text(&reason) };
    let built = |error: object_store::Error| refuse(error.to_string());
    let (scheme, _) = ObjectStoreScheme::parse(url).map_err(|error| refuse(error.to_string()))?;
    let environment = Environment::of_process();
    let client = client(bounds, &environment)?;
    let settings = |prefix: &'static str| environment.with_prefix(prefix);
    Ok(match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let builder = AmazonS3Builder::new().with_client_options(client).with_retry(retry(bounds));
            let profile = profile::s3_settings(&environment)?;
            let builder =
                configured(builder, profile.into_iter().chain(settings("AWS_")), AmazonS3Builder::with_config);
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let builder = GoogleCloudStorageBuilder::new().with_client_options(client).with_retry(retry(bounds));
            let builder = configured(builder, settings("GOOGLE_"), GoogleCloudStorageBuilder::with_config);
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let builder = MicrosoftAzureBuilder::new().with_client_options(client).with_retry(retry(bounds));
            let builder = configured(builder, settings("AZURE_"), MicrosoftAzureBuilder::with_config);
            Arc::new(builder.with_url(url.as_str()).build().map_err(built)?)
        }
        ObjectStoreScheme::Http => {
            // Whoever writes http:// has chosen it; the client wants it said twice.
            let builder =
                HttpBuilder::new().with_client_options(client.with_allow_http(true)).with_retry(retry(bounds));
            Arc::new(builder.with_url(&url[..url::Position::BeforePath]).build().map_err(built)?)
        }
        other => {
            return Err(refuse(format!("stores of kind {other:?} are not remote; expected s3, gs, az or https")));
        }
    })
}

/// [`remote`], or for `file://` and `memory://` the local stores; with the path in it that the URL names.
///
/// # Errors
/// [`StoreError`].
pub fn open(url: &Url, bounds: Bounds) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
    refuse_secrets(url)?;
    let refuse = |error: &dyn std::fmt::Display| StoreError::Url {
        url: redact_text(url.as_str()),
        reason: redact_text(&error.to_string()),
    };
    if matches!(url.scheme(), "file" | "memory") {
        let (store, path) = object_store::parse_url(url).map_err(|error| refuse(&error))?;
        return Ok((Arc::from(store), path));
    }
    let (_, path) = ObjectStoreScheme::parse(url).map_err(|error| refuse(&error))?;
    Ok((remote(url, bounds)?, path))
}

/// Settings that the builder knows, in order; a later one wins. Others with the vendor's prefix are other tools' business.
fn configured<B, K: FromStr>(
    builder: B,
    settings: impl Iterator<Item = (String, String)>,
    set: impl Fn(B, K, String) -> B,
) -> B {
    settings.fold(builder, |builder, (key, value)| match key.parse() {
        Ok(key) => set(builder, key, value),
        Err(_) => builder,
    })
}

/// Requests are bounded by their callers, by size; the client itself only notices dead peers.
fn client(bounds: Bounds, environment: &Environment) -> Result<ClientOptions, StoreError> {
    let mut client = ClientOptions::new()
        .with_connect_timeout(bounds.op_timeout / 6)
        .with_read_timeout(bounds.op_timeout)
        .with_timeout(Duration::from_secs(24 * 3600));
    let Some((variable, file)) = ["AWS_CA_BUNDLE", "SSL_CERT_FILE"].into_iter().find_map(|variable| {
        let file = environment.get(variable).filter(|file| !file.is_empty())?;
        Some((variable, file))
    }) else {
        return Ok(client);
    };
    let refuse = |reason: String| StoreError::File { file: format!("{file} (of {variable})"), reason };
    let bundle = std::fs::read(file).map_err(|error| refuse(error.to_string()))?;
    let certificates = Certificate::from_pem_bundle(&bundle).map_err(|error| refuse(error.to_string()))?;
    if certificates.is_empty() {
        return Err(refuse("no certificate in it; expected PEM blocks".to_owned()));
    }
    for certificate in certificates {
        client = client.with_root_certificate(certificate);
    }
    Ok(client)
}

/// Gives up well before the operation's own deadline, so that the error tells the cause and not only "too late".
fn retry(bounds: Bounds) -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            init_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(3),
            base: 2.0,
        },
        max_retries: 32,
        retry_timeout: bounds.op_timeout / 2,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn secrets_in_a_url_are_refused_without_being_shown() {
        for url in ["https://me:SECRET@host/run", "s3://bucket/run?sig=SECRET", "s3://bucket/run#SECRET"] {
            let error = remote(&Url::parse(url).unwrap(), Bounds::default()).unwrap_err().to_string();
            assert!(!error.contains("SECRET") && error.contains("environment"), "{error}");
        }
    }

    #[test]
    fn a_certificate_bundle_without_certificates_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        let environment = Environment::from([("AWS_CA_BUNDLE".to_owned(), path.clone())]);
        let error = client(Bounds::default(), &environment).unwrap_err().to_string();
        assert!(error.contains(&path) && error.contains("AWS_CA_BUNDLE"), "{error}");
    }
}
