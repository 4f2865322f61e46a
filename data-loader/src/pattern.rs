//! Names with wildcards and ranges: `train-*.parquet`, `part-{00000..00007}-of-00008.parquet`.

use glob::{MatchOptions, Pattern};

/// Most names that ranges may stand for.
const MOST_NAMES: usize = 100_000;

/// As in a shell: `*` does not reach over folders (`**` does), and hidden names must be asked for.
pub(crate) const AS_IN_A_SHELL: MatchOptions =
    MatchOptions { case_sensitive: true, require_literal_separator: true, require_literal_leading_dot: true };

/// Whether a path has wildcards.
pub(crate) fn has_wildcards(path: &str) -> bool {
    path.contains(['*', '?', '['])
}

/// Replaces every `{00000..00007}` and `{a,b}` by what it stands for, in order. Other braces stay.
///
/// # Errors
/// With the words for a message, if that is too many.
pub(crate) fn expand(path: &str) -> Result<Vec<String>, String> {
    let mut names = vec![String::new()];
    let mut rest = path;
    while let Some((before, inside, after)) = braces(rest) {
        let choices = choices(inside)?.unwrap_or_else(|| vec![format!("{{{inside}}}")]);
        if names.len().saturating_mul(choices.len()) > MOST_NAMES {
            return Err(format!("the ranges stand for more than {MOST_NAMES} names"));
        }
        names =
            names.iter().flat_map(|name| choices.iter().map(move |choice| format!("{name}{before}{choice}"))).collect();
        rest = after;
    }
    names.iter_mut().for_each(|name| name.push_str(rest));
    Ok(names)
}

fn braces(text: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = text.split_once('{')?;
    let (inside, after) = rest.split_once('}')?;
    Some((before, inside, after))
}

/// What the inside of braces stands for; `None` if it is neither a range nor a list.
fn choices(inside: &str) -> Result<Option<Vec<String>>, String> {
    if inside.contains(',') {
        return Ok(Some(inside.split(',').map(str::to_owned).collect()));
    }
    let digits = |text: &str| (1..=18).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let Some((first, last)) = inside.split_once("..").filter(|(first, last)| digits(first) && digits(last)) else {
        return Ok(None);
    };
    let (Ok(from), Ok(to)) = (first.parse::<u64>(), last.parse::<u64>()) else { return Ok(None) };
    if from > to {
        return Err(format!("the range {{{inside}}} runs backwards"));
    }
    if to - from >= MOST_NAMES as u64 {
        return Err(format!("the range {{{inside}}} stands for more than {MOST_NAMES} names"));
    }
    // `00000..00007` keeps its zeros, `8..12` gets none.
    let width = if first.len() == last.len() { first.len() } else { 1 };
    Ok(Some((from..=to).map(|number| format!("{number:0width$}")).collect()))
}

/// A path with wildcards.
pub(crate) struct Wildcard {
    pattern: Pattern,
    text: String,
}

impl Wildcard {
    /// # Errors
    /// With the words for a message, if it is no pattern.
    pub fn new(text: &str) -> Result<Self, String> {
        let pattern = Pattern::new(text).map_err(|error| format!("not a pattern: {error}"))?;
        Ok(Self { pattern, text: text.to_owned() })
    }

    /// The folder that everything that fits is below.
    pub fn folder(&self) -> &str {
        let literal = self.text.find(['*', '?', '[']).map_or(&self.text[..], |at| &self.text[..at]);
        literal.rsplit_once('/').map_or("", |(folder, _)| folder)
    }

    /// Whether a file's path fits, itself or by a folder that it is in.
    pub fn fits(&self, path: &str) -> bool {
        let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
        ends.into_iter().any(|end| self.pattern.matches_with(&path[..end], AS_IN_A_SHELL)) && !self.is_hidden(path)
    }

    /// Whether a part of the path that the pattern does not spell out begins with `.` or `_`.
    fn is_hidden(&self, path: &str) -> bool {
        let asked_for = |start: char| self.text.split('/').any(|part| part.starts_with(start));
        let spelled = |part: &str| self.text.split('/').any(|other| other == part);
        path.split('/')
            .any(|part| ['.', '_'].iter().any(|start| part.starts_with(*start) && !asked_for(*start) && !spelled(part)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_lists_stand_for_names_in_order() {
        assert_eq!(expand("a/b.parquet").unwrap(), ["a/b.parquet"]);
        assert_eq!(
            expand("{x,y}/part-{00009..00011}-of-00012").unwrap(),
            ["x", "y"].map(|x| ["00009", "00010", "00011"].map(|n| format!("{x}/part-{n}-of-00012"))).concat()
        );
        assert_eq!(expand("{8..10}{one}{").unwrap(), ["8{one}{", "9{one}{", "10{one}{"]);
        for (text, words) in [
            ("{5..1}", "backwards"),
            ("{0..99999999999999999}", "100000 names"),
            ("{0..9999}{0..9999}", "100000 names"),
        ] {
            assert!(expand(text).unwrap_err().contains(words), "{text}");
        }
    }

    #[test]
    fn wildcards_fit_as_in_a_shell() {
        let wildcard = Wildcard::new("set/class=*/train-0000[0-3]-*").unwrap();
        assert_eq!(wildcard.folder(), "set");
        for (path, fits) in [
            ("set/class=1/train-00002-of-00008.parquet", true),
            ("set/class=1/train-00002-x/a.parquet", true),
            ("set/class=1/train-00004-of-00008.parquet", false),
            ("set/train-00002-of-00008.parquet", false),
        ] {
            assert_eq!(wildcard.fits(path), fits, "{path}");
        }
        let any = Wildcard::new("_data/*").unwrap();
        assert!(any.fits("_data/a.parquet") && any.fits("_data/x/a.parquet") && !any.fits("_data/.x/a.parquet"));
        assert!(Wildcard::new("a/**/b-*.parquet").unwrap().fits("a/x/y/b-1.parquet"));
        assert!(Wildcard::new("a/***").is_err());
    }
}
