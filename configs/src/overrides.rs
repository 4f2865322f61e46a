//! `--set key=value`: applied to the parsed file before anything is checked.

use std::collections::BTreeMap;

use toml::{Table, Value};

use crate::error::Mistake;

/// The overrides that took effect: dotted key → the text after `=`.
pub(crate) type Applied = BTreeMap<String, String>;

/// Puts every override into `root`. The value is read as TOML, and as a plain string if it is not TOML; the last
/// override of a key wins.
pub(crate) fn apply(root: &mut Table, overrides: &[String], mistakes: &mut Vec<Mistake>) -> Applied {
    let mut applied = Applied::new();
    for argument in overrides {
        match split(argument).and_then(|(key, text)| put(root, &key, text).map(|()| (key.join("."), text))) {
            Ok((key, text)) => {
                applied.insert(key, text.to_owned());
            }
            Err((problem, advice)) => mistakes.push(Mistake {
                origin: "--set".to_owned(),
                // Only the part before `=`: the value may be a secret.
                key: argument.split('=').next().unwrap_or_default().trim().to_owned(),
                found: None,
                problem,
                advice,
            }),
        }
    }
    applied
}

type Refusal = (String, String);

fn split(argument: &str) -> Result<(Vec<&str>, &str), Refusal> {
    let (key, text) = argument.split_once('=').ok_or_else(|| {
        ("has no value".to_owned(), "write --set key=value, for example --set train.steps=100".to_owned())
    })?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    let bare =
        |part: &&str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if !parts.iter().all(bare) {
        return Err(("is not a dotted key".to_owned(), "write --set section.key=value".to_owned()));
    }
    Ok((parts, text.trim()))
}

fn put(root: &mut Table, key: &[&str], text: &str) -> Result<(), Refusal> {
    let Some((last, sections)) = key.split_last() else {
        return Ok(());
    };
    let mut table = root;
    for section in sections {
        let entry = table.entry(section.to_string()).or_insert_with(|| Value::Table(Table::new()));
        table = entry.as_table_mut().ok_or_else(|| {
            (format!("goes through `{section}`, which is a value and not a section"), "check the key".to_owned())
        })?;
    }
    table.insert((*last).to_owned(), value(text));
    Ok(())
}

fn value(text: &str) -> Value {
    let plain = || Value::String(text.to_owned());
    if text.contains('\n') {
        return plain();
    }
    toml::from_str::<Table>(&format!("value = {text}"))
        .ok()
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(plain)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn applied(text: &str, overrides: &[&str]) -> (Table, Vec<Mistake>) {
        let mut root: Table = toml::from_str(text).unwrap();
        let mut mistakes = Vec::new();
        let overrides: Vec<String> = overrides.iter().map(|s| s.to_string()).collect();
        apply(&mut root, &overrides, &mut mistakes);
        (root, mistakes)
    }

    #[test]
    fn values_are_toml_and_fall_back_to_text() {
        let (root, mistakes) = applied(
            "[train]\nsteps = 5",
            &["train.steps=7", "optimizer.betas=[0.9, 0.95]", "train.device=cpu", "run.url=s3://b/r?a=b", "seed = 3"],
        );
        assert!(mistakes.is_empty(), "{mistakes:?}");
        assert_eq!(root["train"]["steps"], Value::Integer(7));
        assert_eq!(root["optimizer"]["betas"], Value::Array(vec![Value::Float(0.9), Value::Float(0.95)]));
        assert_eq!(root["train"]["device"], Value::String("cpu".into()));
        assert_eq!(root["run"]["url"], Value::String("s3://b/r?a=b".into()));
        assert_eq!(root["seed"], Value::Integer(3));
    }

    #[test]
    fn the_last_of_a_key_wins() {
        let (root, _) = applied("", &["train.steps=7", "train.steps=8"]);
        assert_eq!(root["train"]["steps"], Value::Integer(8));
    }

    #[test]
    fn malformed_overrides_are_mistakes_that_show_no_value() {
        let (_, mistakes) = applied("seed = 1", &["train.steps", "train..x=secret", "seed.deeper=secret"]);
        assert_eq!(mistakes.len(), 3);
        assert!(mistakes.iter().all(|m| !m.to_string().contains("secret")), "{mistakes:?}");
    }
}
