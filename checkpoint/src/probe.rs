//! Whether a store can keep the protocol's promises: tried on one small object, before a run relies on it.

use crate::{
    attempt::random_u64,
    backend::{FailureKind, Landed},
    error::CheckpointError,
    keys, runtime,
    store::RunStore,
};

impl RunStore {
    /// Creates an object, is refused to create it again, lists it, reads it back and deletes it.
    ///
    /// # Errors
    /// What the store refuses, or does although it must not; [`CheckpointError::Store`] names the operation.
    pub fn probe(&self) -> Result<(), CheckpointError> {
        let backend = &self.backend;
        runtime::wait(async {
            let key = keys::probe(random_u64());
            let broken = |operation, reason: &str| CheckpointError::Store {
                url: backend.url.clone(),
                operation,
                key: key.clone(),
                reason: reason.to_owned(),
            };
            let (first, second) = (b"{\"probe\":1}\n", b"{\"other\":2}\n");
            let tried = async {
                if backend.create_small(&key, first).await? != Landed::Ours {
                    return Err(broken("create", "another process has made the same random name"));
                }
                if backend.create_small(&key, second).await? != Landed::Theirs {
                    let reason = "an object that exists was overwritten; commits need a store that refuses to create an object \
                                  twice (S3: If-None-Match)";
                    return Err(broken("create", reason));
                }
                if !backend.list(keys::PROBES).await?.contains(&key) {
                    return Err(broken("list", "an object that was created is not listed; commits need consistent listings"));
                }
                if backend.get_small(&key).await?.as_ref() != first {
                    return Err(broken("read", "other bytes than were written"));
                }
                Ok(())
            }
            .await;
            let deleted = backend.delete(std::slice::from_ref(&key)).await;
            tried.and(deleted)?;
            match backend.size_bytes(&key).await {
                Err(failure) if failure.kind == FailureKind::Absent => Ok(()),
                Err(failure) => Err(failure.error),
                Ok(_) => Err(broken("delete", "the object is still there")),
            }
        })
    }
}
