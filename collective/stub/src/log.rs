//! What was called, and what is to go wrong.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

/// Where ranks meet.
pub fn folder() -> PathBuf {
    std::env::var_os("DITHAROS_STUB_DIR").expect("the stub needs DITHAROS_STUB_DIR").into()
}

/// This process's rank, as what started it says.
pub fn rank() -> usize {
    let of = |name| std::env::var(name).ok()?.parse().ok();
    of("OMPI_COMM_WORLD_RANK").or(of("RANK")).unwrap_or(0)
}

/// Writes a line to this rank's log.
pub fn call(line: &str) {
    static LOG: OnceLock<Mutex<File>> = OnceLock::new();
    let open = || {
        let path = folder().join(format!("calls.{}", rank()));
        Mutex::new(OpenOptions::new().append(true).create(true).open(path).expect("the stub's log"))
    };
    let mut log = LOG.get_or_init(open).lock().expect("the stub's log");
    writeln!(log, "{line}").expect("the stub's log");
}

/// How a function is to go wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It returns an error.
    Fail,
    /// It is reported as failed later.
    Async,
    /// It never ends.
    Hang,
}

/// The fault of `function` on this rank, if any.
pub fn fault(function: &str) -> Option<Fault> {
    let fault = std::env::var("DITHAROS_STUB_FAULT").ok()?;
    let mut parts = fault.split(':');
    let kind = match parts.next()? {
        "fail" => Fault::Fail,
        "async" => Fault::Async,
        "hang" => Fault::Hang,
        other => panic!("DITHAROS_STUB_FAULT: {other}"),
    };
    (parts.next()? == function && parts.next()?.parse() == Ok(rank())).then_some(kind)
}
