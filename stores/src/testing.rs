//! For tests: a small server of the S3 protocol and of GCS's, and a proxy that spoils a share of what goes through it; both listen on a free
//! loopback port and stop when they are dropped. And a store in memory that answers as a test wants.
#![allow(clippy::unwrap_used)]

mod http;
mod proxy;
mod server;
mod tampered;

pub use proxy::FaultyProxy;
pub use server::MiniS3;
pub use tampered::{Tamper, Tampered};
