//! For tests: a small server of the S3 protocol, and a proxy that spoils a share of what goes through it. Both listen on a free
//! loopback port and stop when they are dropped.
#![allow(clippy::unwrap_used)]

mod http;
mod proxy;
mod server;

pub use proxy::FaultyProxy;
pub use server::MiniS3;
