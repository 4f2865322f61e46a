//! One bundle from file to verdict.

use crate::bundle::{Bundle, BundleError};
use crate::kinds::KINDS;
use crate::report::{Findings, Report};
use crate::tolerance::Tolerances;
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What became of one file.
pub struct Verdict {
    /// The kind, where the file could be read so far.
    pub kind: Option<String>,
    /// The comparisons.
    pub findings: Findings,
}

/// Loads the bundle at `path` and runs it. Never fails: what goes wrong is a finding.
pub fn verify(path: &Path) -> Verdict {
    let failed = |kind: Option<String>, error: BundleError| {
        let mut findings = Findings { lines: Vec::new(), ok: true, worst_ratio: 0.0 };
        findings.failure(&error.to_string());
        Verdict { kind, findings }
    };
    let bundle = match Bundle::load(path) {
        Ok(bundle) => bundle,
        Err(error) => return failed(None, error),
    };
    let name = match bundle.spec.kind() {
        Ok(name) => name,
        Err(error) => return failed(None, error),
    };
    let Some(kind) = KINDS.iter().find(|kind| kind.name == name) else {
        let known: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
        return failed(Some(name.clone()), BundleError::UnknownKind { found: name, known: known.join(", ") });
    };
    let partner = match (kind.partner)(&bundle) {
        Ok(partner) => partner,
        Err(error) => return failed(Some(name), error),
    };
    let references = match (kind.references_in_partner, &partner) {
        (true, Some(partner)) => partner,
        _ => &bundle,
    };
    let mut report = Report::new(references, Tolerances::new(&references.spec, kind.tolerances));
    // libtorch's refusals are panics in tch: the shapes of a damaged bundle can cause one anywhere.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let run = catch_unwind(AssertUnwindSafe(|| (kind.run)(&bundle, partner.as_ref(), &mut report)));
    std::panic::set_hook(hook);
    let cut_short = match run {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(format!("could not be run: {}", message(&*panic))),
    };
    Verdict { kind: Some(name), findings: report.finish(&bundle, cut_short) }
}

/// The first line of a panic's message.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.and_then(|text| text.lines().next()).unwrap_or("no message").to_owned()
}
