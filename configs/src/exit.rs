//! Exit codes of `launcher` and `trainer`, so that scripts and schedulers can act on them.

/// The last step was reached and committed.
pub const OK: i32 = 0;
/// Something failed; the message on stderr says what.
pub const FAILED: i32 = 1;
/// The command line or the config is wrong; running it again unchanged is useless.
pub const USAGE: i32 = 2;
/// Stopped on request after saving; the same command continues the run (EX_TEMPFAIL: requeue on it).
pub const RESUMABLE: i32 = 75;
