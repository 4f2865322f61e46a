//! What people see of a run: a JSON-lines log, events and heartbeats for the launcher, TensorBoard files, a trace.

mod device_rate;
mod heartbeat;
mod journal;
mod run_files;
mod tensorboard;
mod trace;
mod uploads;

pub use device_rate::measured_gemm_rate;
pub use heartbeat::Heartbeat;
pub use journal::{Journal, LogSink};
pub use run_files::{RunFiles, RunFilesError};
pub use tensorboard::TensorBoard;
pub use trace::{Trace, TraceArgs};
