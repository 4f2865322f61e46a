//! A store is tried before a run relies on it.

use async_trait::async_trait;
use checkpoint::{CheckpointError, RunStore, StoreOptions};
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    Error, GetOptions, GetResult, ObjectMeta, ObjectStore, PutMode, PutOptions, PutPayload, PutResult, Result,
    memory::InMemory, path::Path,
};
use std::sync::Arc;
use stores::testing::{Tamper, Tampered};

/// What a store does that it must not do.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Vice {
    None,
    Overwrites,
    HidesNewObjects,
    CannotDelete,
    KeepsDeleted,
    ReadOnly,
}

#[async_trait]
impl Tamper for Vice {
    async fn put(
        &self,
        inner: &InMemory,
        path: &Path,
        payload: PutPayload,
        mut options: PutOptions,
    ) -> Result<PutResult> {
        match self {
            Vice::Overwrites => options.mode = PutMode::Overwrite,
            Vice::ReadOnly => return Err(Error::PermissionDenied { path: path.to_string(), source: "403".into() }),
            _ => {}
        }
        inner.put_opts(path, payload, options).await
    }

    async fn get(&self, inner: &InMemory, path: &Path, options: GetOptions) -> Result<GetResult> {
        inner.get_opts(path, options).await
    }

    fn delete(&self, inner: &InMemory, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        match self {
            Vice::CannotDelete => {
                paths.map(|path| Err(Error::PermissionDenied { path: path?.to_string(), source: "403".into() })).boxed()
            }
            Vice::KeepsDeleted => paths,
            _ => inner.delete_stream(paths),
        }
    }

    fn list(&self, inner: &InMemory, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self {
            Vice::HidesNewObjects => futures::stream::empty().boxed(),
            _ => inner.list(prefix),
        }
    }
}

fn probe(vice: Vice) -> (std::result::Result<(), String>, usize) {
    let store = Arc::new(Tampered::new(vice));
    let options = StoreOptions { retry_pause: std::time::Duration::from_millis(1), ..StoreOptions::default() };
    let run = RunStore::over(store.clone(), "run", "test://bucket/run", options).unwrap();
    let said = run.probe().map_err(|error: CheckpointError| error.to_string());
    let left = tokio::runtime::Runtime::new().unwrap().block_on(store.inner.list(None).count());
    (said, left)
}

#[test]
fn a_sound_store_passes_and_nothing_is_left_in_it() {
    assert_eq!(probe(Vice::None), (Ok(()), 0));
}

#[test]
fn what_a_store_does_wrong_is_named() {
    for (vice, said, left) in [
        (Vice::Overwrites, "an object that exists was overwritten", 0),
        (Vice::HidesNewObjects, "is not listed", 0),
        (Vice::CannotDelete, "delete `probes/", 1),
        (Vice::KeepsDeleted, "the object is still there", 1),
        (Vice::ReadOnly, "create `probes/", 0),
    ] {
        let (found, remains) = probe(vice);
        let found = found.unwrap_err();
        assert!(found.contains(said), "{vice:?}: {found}");
        assert_eq!(remains, left, "{vice:?}");
    }
}
