//! A reader of TOML values that never stops at a mistake: it notes it, hands out a stand-in and goes on.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds, RangeInclusive};

use toml::{Table, Value};

use crate::error::Mistake;
use crate::overrides::Applied;

/// Walks one config. Stand-ins handed out after a mistake never leave the crate: any mistake makes the load fail.
pub(crate) struct Reader<'a> {
    file: String,
    root: &'a Table,
    applied: &'a Applied,
    known: BTreeSet<&'static str>,
    mistakes: Vec<Mistake>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(file: String, root: &'a Table, applied: &'a Applied, mistakes: Vec<Mistake>) -> Self {
        Reader { file, root, applied, known: BTreeSet::new(), mistakes }
    }

    /// The value of a key was given (rightly or wrongly).
    pub(crate) fn given(&self, key: &str) -> bool {
        find(self.root, key).is_some()
    }

    /// None of these keys has a mistake, so that they can be checked against each other.
    pub(crate) fn sound(&self, keys: &[&str]) -> bool {
        !self.mistakes.iter().any(|mistake| keys.contains(&mistake.key.as_str()))
    }

    /// Notes a mistake about a key, quoting its value if it was given.
    pub(crate) fn refuse(&mut self, key: &str, problem: impl Into<String>, advice: impl Into<String>) {
        let found = find(self.root, key).map(|value| shown(key, value));
        let origin = self.origin(key);
        self.mistakes.push(Mistake {
            origin,
            key: key.to_owned(),
            found,
            problem: problem.into(),
            advice: advice.into(),
        });
    }

    pub(crate) fn integer(&mut self, key: &'static str, range: RangeInclusive<u64>, default: u64) -> u64 {
        self.optional_integer(key, range).unwrap_or(default)
    }

    pub(crate) fn required_integer(&mut self, key: &'static str, range: RangeInclusive<u64>, advice: &str) -> u64 {
        let stand_in = *range.start();
        self.require(key, advice);
        self.integer(key, range, stand_in)
    }

    pub(crate) fn optional_integer(&mut self, key: &'static str, range: RangeInclusive<u64>) -> Option<u64> {
        let expected = match *range.end() {
            end if end >= i64::MAX as u64 => {
                format!("give an integer of at least {}", range.start())
            }
            end => format!("give an integer from {} to {end}", range.start()),
        };
        let value = match self.take(key)? {
            Value::Integer(value) => *value,
            other => return self.wrong_type(key, other, "an integer", &expected),
        };
        match u64::try_from(value).ok().filter(|value| range.contains(value)) {
            Some(value) => Some(value),
            None => {
                self.refuse(key, "is out of range", expected);
                None
            }
        }
    }

    pub(crate) fn float(&mut self, key: &'static str, range: impl RangeBounds<f64>, default: f64) -> f64 {
        self.optional_float(key, range).unwrap_or(default)
    }

    pub(crate) fn required_float(&mut self, key: &'static str, range: impl RangeBounds<f64>, advice: &str) -> f64 {
        self.require(key, advice);
        self.float(key, range, 1.0)
    }

    /// A finite number inside `range`; integers are taken as well.
    pub(crate) fn optional_float(&mut self, key: &'static str, range: impl RangeBounds<f64>) -> Option<f64> {
        let value = self.take(key)?;
        let expected = format!("give a number {}", described(&range));
        let Some(number) = number(value) else {
            return self.wrong_type(key, value, "a number", &expected);
        };
        if !(number.is_finite() && range.contains(&number)) {
            self.refuse(key, "is out of range", expected);
            return None;
        }
        Some(number)
    }

    /// An array of exactly two finite numbers inside `range`.
    pub(crate) fn float_pair(
        &mut self,
        key: &'static str,
        range: impl RangeBounds<f64>,
        default: [f64; 2],
    ) -> [f64; 2] {
        let expected = format!("give two numbers {} in brackets, such as {default:?}", described(&range));
        match self.numbers(key, range, &expected).as_deref() {
            None => default,
            Some(&[first, second]) => [first, second],
            Some(_) => {
                self.refuse(key, "is not a pair of numbers", expected);
                default
            }
        }
    }

    /// An array of finite numbers inside `range`, no two equal; empty when not given.
    pub(crate) fn distinct_floats(&mut self, key: &'static str, range: impl RangeBounds<f64>) -> Vec<f64> {
        let expected = format!("give numbers {} in brackets, each once", described(&range));
        let numbers = self.numbers(key, range, &expected).unwrap_or_default();
        if (1..numbers.len()).any(|index| numbers[..index].contains(&numbers[index])) {
            self.refuse(key, "has a number twice", expected);
        }
        numbers
    }

    /// An array of finite numbers inside `range`; empty when not given.
    pub(crate) fn floats(&mut self, key: &'static str, range: impl RangeBounds<f64>) -> Vec<f64> {
        let expected = format!("give numbers {} in brackets", described(&range));
        self.numbers(key, range, &expected).unwrap_or_default()
    }

    fn numbers(&mut self, key: &'static str, range: impl RangeBounds<f64>, expected: &str) -> Option<Vec<f64>> {
        let value = self.take(key)?;
        let numbers: Option<Vec<f64>> = value.as_array().and_then(|array| array.iter().map(number).collect());
        let problem = match numbers {
            None => "is not an array of numbers",
            Some(numbers) if numbers.iter().all(|number| number.is_finite() && range.contains(number)) => {
                return Some(numbers);
            }
            Some(_) => "is out of range",
        };
        self.refuse(key, problem, expected);
        None
    }

    /// An array of tables (`[[key]]`), each read by `read` with a reader of its own; empty when not given.
    pub(crate) fn tables<T>(&mut self, key: &'static str, read: impl Fn(&mut Reader) -> T) -> Vec<T> {
        let Some(value) = self.take(key) else { return Vec::new() };
        let tables: Option<Vec<&Table>> =
            value.as_array().and_then(|array| array.iter().map(Value::as_table).collect());
        let Some(tables) = tables else {
            self.refuse(key, "is not an array of tables", format!("write [[{key}]] above each"));
            return Vec::new();
        };
        let (origin, none) = (self.origin(key), Applied::new());
        let mut read_one = |(index, table)| {
            let mut reader = Reader::new(origin.clone(), table, &none, Vec::new());
            let read = read(&mut reader);
            let of_key = |mistake: Mistake| Mistake { key: format!("{key}[{index}].{}", mistake.key), ..mistake };
            self.mistakes.extend(reader.finish().into_iter().map(of_key));
            read
        };
        tables.into_iter().enumerate().map(&mut read_one).collect()
    }

    /// An array of strings, none of them empty; empty when not given.
    pub(crate) fn text_list(&mut self, key: &'static str) -> Vec<String> {
        self.optional_text_list(key).unwrap_or_default()
    }

    /// An array of strings, none of them empty.
    pub(crate) fn optional_text_list(&mut self, key: &'static str) -> Option<Vec<String>> {
        let text = |value: &Value| value.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
        let texts = self.take(key)?.as_array().and_then(|array| array.iter().map(text).collect());
        if texts.is_none() {
            self.refuse(key, "is not an array of names", "write strings in brackets, such as [\"*.bias\"]");
        }
        texts
    }

    /// A string, or an array of at least one. As for [`Reader::optional_text`], an override may be another TOML value.
    pub(crate) fn one_or_more_texts(&mut self, key: &'static str) -> Option<Vec<String>> {
        let Value::Array(array) = self.take(key)? else { return self.optional_text(key).map(|text| vec![text]) };
        let texts: Option<Vec<String>> = array.iter().map(|value| value.as_str().map(str::to_owned)).collect();
        match texts.filter(|texts| !texts.is_empty()) {
            Some(texts) => Some(texts),
            None => {
                self.refuse(
                    key,
                    "is neither a string nor an array of strings",
                    "write one in quotes, or several in brackets",
                );
                None
            }
        }
    }

    pub(crate) fn boolean(&mut self, key: &'static str, default: bool) -> bool {
        match self.take(key) {
            None => default,
            Some(Value::Boolean(value)) => *value,
            Some(other) => self.wrong_type(key, other, "true or false", "write true or false").unwrap_or(default),
        }
    }

    /// `false`, `true` or one of a few words; `of_flags` are what the first two stand for, and `false` is the default.
    pub(crate) fn flag_or_choice<T: Copy>(&mut self, key: &'static str, of_flags: [T; 2], choices: &[(&str, T)]) -> T {
        let found = match self.take(key) {
            None => return of_flags[0],
            Some(Value::Boolean(flag)) => return of_flags[usize::from(*flag)],
            Some(Value::String(text)) => choices.iter().find(|(name, _)| name == text).map(|(_, choice)| *choice),
            Some(_) => None,
        };
        found.unwrap_or_else(|| {
            let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
            self.refuse(key, "is not one of the choices", format!("use false, true or {}", names.join(" or ")));
            of_flags[0]
        })
    }

    pub(crate) fn text(&mut self, key: &'static str, default: &str) -> String {
        let text = self.optional_text(key).unwrap_or_else(|| default.to_owned());
        if text.is_empty() && self.given(key) && self.sound(&[key]) {
            self.refuse(key, "is empty", "give a name or leave the key out");
        }
        text
    }

    /// A string. An override that happens to be another TOML value (`--set data.url=2024`) is taken by its text.
    pub(crate) fn optional_text(&mut self, key: &'static str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text.clone()),
            other => match self.applied.get(key) {
                Some(text) => Some(text.clone()),
                None => self.wrong_type(key, other, "a string", "write it in quotes"),
            },
        }
    }

    /// One of a few words.
    pub(crate) fn choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)], default: T) -> T {
        self.optional_choice(key, choices).unwrap_or(default)
    }

    /// One of a few words, or nothing.
    pub(crate) fn optional_choice<T: Copy>(&mut self, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let text = self.optional_text(key)?;
        if let Some((_, choice)) = choices.iter().find(|(name, _)| *name == text) {
            return Some(*choice);
        }
        let names: Vec<String> = choices.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        self.refuse(key, "is not one of the choices", format!("use {}", names.join(" or ")));
        None
    }

    /// Notes a mistake if the key is missing.
    pub(crate) fn require(&mut self, key: &'static str, advice: &str) {
        self.known.insert(key);
        if !self.given(key) {
            self.refuse(key, "is missing", advice);
        }
    }

    /// Ends the reading: every key that nobody asked for is one more mistake.
    pub(crate) fn finish(mut self) -> Vec<Mistake> {
        let mut strays = Vec::new();
        self.collect_strays("", self.root, &mut strays);
        for (key, value) in strays {
            let (problem, advice) = match (self.is_section(&key), nearest(&key, &self.candidates(value))) {
                (true, _) => (format!("is {}, not a section", kind(value)), format!("write a table [{key}]")),
                (_, Some(near)) => ("is not a known key".to_owned(), format!("did you mean `{near}`?")),
                (_, None) => ("is not a known key".to_owned(), "remove it; the user guide lists all keys".to_owned()),
            };
            // Values of unknown keys are not shown: they may be secrets that were put into the wrong place.
            let origin = self.origin(&key);
            self.mistakes.push(Mistake { origin, key, found: None, problem, advice });
        }
        self.mistakes
    }

    /// Every value, as deep as the sections are known, that nobody asked for.
    fn collect_strays(&self, prefix: &str, table: &'a Table, strays: &mut Vec<(String, &'a Value)>) {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            match value {
                _ if self.known.contains(key.as_str()) => {}
                Value::Table(inner) if self.is_section(&key) => self.collect_strays(&format!("{key}."), inner, strays),
                _ => strays.push((key, value)),
            }
        }
    }

    fn is_section(&self, key: &str) -> bool {
        self.known.iter().any(|known| known.strip_prefix(key).is_some_and(|rest| rest.starts_with('.')))
    }

    /// What an unknown key may have been meant to be: a section if it holds keys itself, else a key.
    fn candidates(&self, value: &Value) -> BTreeSet<&'static str> {
        match value {
            Value::Table(_) => self.known.iter().filter_map(|key| Some(key.rsplit_once('.')?.0)).collect(),
            _ => self.known.clone(),
        }
    }

    fn origin(&self, key: &str) -> String {
        let within =
            |applied: &String| applied == key || applied.strip_prefix(key).is_some_and(|rest| rest.starts_with('.'));
        match self.applied.keys().any(within) {
            true => "--set".to_owned(),
            false => self.file.clone(),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<&'a Value> {
        self.known.insert(key);
        find(self.root, key)
    }

    fn wrong_type<T>(&mut self, key: &str, found: &Value, wanted: &str, expected: &str) -> Option<T> {
        self.refuse(key, format!("is {}, not {wanted}", kind(found)), expected);
        None
    }
}

fn find<'a>(root: &'a Table, key: &str) -> Option<&'a Value> {
    let mut parts = key.split('.');
    let first = root.get(parts.next()?)?;
    parts.try_fold(first, |value, part| value.as_table()?.get(part))
}

fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Float(number) => Some(*number),
        Value::Integer(number) => Some(*number as f64),
        _ => None,
    }
}

/// The value as TOML text, short, and without what may be secret in a URL.
fn shown(key: &str, value: &Value) -> String {
    let text = match value {
        Value::String(text) if key.ends_with("url") || text.contains("://") => {
            format!("\"{}\"", crate::location::redact(text))
        }
        Value::Table(_) => "a section".to_owned(),
        Value::Array(values) => {
            let shown: Vec<String> = values.iter().map(|value| shown(key, value)).collect();
            format!("[{}]", shown.join(", "))
        }
        other => other.to_string(),
    };
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a string",
        Value::Integer(_) => "an integer",
        Value::Float(_) => "a float",
        Value::Boolean(_) => "a boolean",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "an array",
        Value::Table(_) => "a section",
    }
}

fn described(range: &impl RangeBounds<f64>) -> String {
    let side = |bound: Bound<&f64>, included: &str, excluded: &str| match bound {
        Bound::Included(limit) => Some(format!("{included} {}", compact(*limit))),
        Bound::Excluded(limit) => Some(format!("{excluded} {}", compact(*limit))),
        Bound::Unbounded => None,
    };
    let low = side(range.start_bound(), "of at least", "above");
    let high = side(range.end_bound(), "at most", "below");
    [low, high].into_iter().flatten().collect::<Vec<_>>().join(" and ")
}

fn compact(number: impl Debug) -> String {
    format!("{number:?}").trim_end_matches(".0").to_owned()
}

/// The known key that the unknown one was most likely meant to be: close in spelling, as a whole or in its last part
/// (a key in the wrong section).
fn nearest(key: &str, known: &BTreeSet<&'static str>) -> Option<&'static str> {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let likeness = |known: &str| {
        let whole = strsim::jaro_winkler(key, known);
        // Slightly less, so that the same section wins.
        let part = 0.98 * strsim::jaro_winkler(&last(key), &last(known));
        let edits = strsim::damerau_levenshtein(&last(key), &last(known));
        let near = edits <= 1 + last(known).len() / 4 || whole > 0.92;
        near.then_some(whole.max(part))
    };
    known
        .iter()
        .filter_map(|known| Some((likeness(known)?, *known)))
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, known)| known)
}
