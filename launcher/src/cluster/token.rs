//! The secret by which ranks that meet over TCP know each other, new at every start.

use std::fs::File;
use std::io::Read;

use anyhow::Context;

/// Where ranks look for it, or for a file with it (docs/COLLECTIVE.md).
const VARIABLES: [&str; 2] = ["DITHAROS_RENDEZVOUS_TOKEN", "DITHAROS_RENDEZVOUS_TOKEN_FILE"];

/// The variable that hands a new secret to the engine and its ranks; none where the caller has given one. It is never an argument, of
/// which others can read, and never part of what is shown of a plan.
pub fn for_one_start() -> anyhow::Result<Option<(&'static str, String)>> {
    if VARIABLES.iter().any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty())) {
        return Ok(None);
    }
    let mut random = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut source| source.read_exact(&mut random))
        .context("cannot read /dev/urandom, of which the secret of this run's ranks is made")?;
    Ok(Some((VARIABLES[0], random.iter().map(|byte| format!("{byte:02x}")).collect())))
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_start_has_a_secret_of_its_own_that_nobody_guesses() {
        let new = || super::for_one_start().unwrap().unwrap().1;
        let (first, second) = (new(), new());
        assert!(first.len() == 64 && first != second);
    }
}
