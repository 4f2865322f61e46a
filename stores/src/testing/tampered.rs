//! A store that goes wrong.

use async_trait::async_trait;
use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result, memory::InMemory, path::Path,
};
use std::fmt;

/// What a [`Tampered`] store does with a request before, instead of or after passing it on, which is all that the methods do
/// unless they are written anew. Requests for several ranges come as several [`get`](Tamper::get)s.
#[async_trait]
pub trait Tamper: fmt::Debug + Send + Sync + 'static {
    /// [`ObjectStore::put_opts`].
    async fn put(&self, inner: &InMemory, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        inner.put_opts(path, payload, options).await
    }

    /// [`ObjectStore::get_opts`].
    async fn get(&self, inner: &InMemory, path: &Path, options: GetOptions) -> Result<GetResult> {
        inner.get_opts(path, options).await
    }

    /// [`ObjectStore::delete_stream`].
    fn delete(&self, inner: &InMemory, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        inner.delete_stream(paths)
    }

    /// [`ObjectStore::list`].
    fn list(&self, inner: &InMemory, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        inner.list(prefix)
    }
}

/// A store in memory whose requests go through a [`Tamper`].
#[derive(Debug, Default)]
pub struct Tampered<T> {
    /// What really is there.
    pub inner: InMemory,
    /// What happens on the way.
    pub tamper: T,
}

impl<T> Tampered<T> {
    /// An empty one.
    pub fn new(tamper: T) -> Self {
        Self { inner: InMemory::new(), tamper }
    }
}

impl<T: Tamper> fmt::Display for Tampered<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("store for tests")
    }
}

#[async_trait]
impl<T: Tamper> ObjectStore for Tampered<T> {
    async fn put_opts(&self, path: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.tamper.put(&self.inner, path, payload, options).await
    }

    async fn put_multipart_opts(&self, path: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.tamper.get(&self.inner, path, options).await
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.tamper.delete(&self.inner, paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.tamper.list(&self.inner, prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
