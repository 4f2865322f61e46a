//! The process's one I/O runtime, behind a synchronous call.

use crate::error::CheckpointError;
use std::sync::OnceLock;
use tokio::runtime::{Builder, Handle, Runtime};

/// Two threads serve the network and the hashing of several chunks at a time; file I/O runs on tokio's blocking threads.
const WORKERS: usize = 2;

/// Never dropped: dropping waits for blocking file operations, which on a dead network disk never end.
fn runtime() -> Result<&'static Runtime, CheckpointError> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    RUNTIME
        .get_or_init(|| {
            Builder::new_multi_thread()
                .worker_threads(WORKERS)
                .thread_name("checkpoint-io")
                .enable_all()
                .build()
                .map_err(|e| e.to_string())
        })
        .as_ref()
        .map_err(|reason| CheckpointError::Runtime { reason: reason.clone() })
}

/// Runs `work` to its end on the calling thread. Inside another runtime, which forbids blocking, on a helper thread.
pub(crate) fn wait<T: Send>(
    work: impl Future<Output = Result<T, CheckpointError>> + Send,
) -> Result<T, CheckpointError> {
    let runtime = runtime()?;
    if Handle::try_current().is_err() {
        return runtime.block_on(work);
    }
    std::thread::scope(|scope| match scope.spawn(|| runtime.block_on(work)).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
