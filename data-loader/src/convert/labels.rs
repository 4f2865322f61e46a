//! Labels from a file beside the source: names of samples to classes.

use std::collections::HashMap;

use super::files::Place;
use crate::DataError;

/// Far more than a table of ImageNet-21k.
const MOST_BYTES: u64 = 4 << 30;

/// Which class each named sample has.
#[derive(Clone, Debug)]
pub struct LabelMap {
    name: String,
    classes: HashMap<String, i64>,
}

impl LabelMap {
    /// Reads a JSON object `{"id": class}` (`.json`) or lines `id,class` (any other name; a first line without a number is
    /// a heading; ids with commas or quotes stand in double quotes).
    ///
    /// # Errors
    /// If the file cannot be read, a line makes no sense, or an id is there twice with different classes.
    pub fn read(url: &str) -> Result<Self, DataError> {
        let place = Place::parse(url)?;
        let name = place.name();
        let text = String::from_utf8(place.read(MOST_BYTES)?)
            .map_err(|error| DataError::source(&name, format!("is no UTF-8 text: {error}")))?;
        let classes = if place.file_name().ends_with(".json") {
            serde_json::from_str(&text)
                .map_err(|error| DataError::source(&name, format!("is no object of ids to classes: {error}")))?
        } else {
            of_lines(&text).map_err(|(line, reason)| DataError::source(format!("{name}: line {line}"), reason))?
        };
        Ok(Self { name, classes })
    }

    /// The class of a sample.
    ///
    /// # Errors
    /// If the file does not tell.
    pub(super) fn class(&self, id: &str, place: impl FnOnce() -> String) -> Result<i64, DataError> {
        self.classes.get(id).copied().ok_or_else(|| {
            DataError::source(place(), format!("has the id `{id}`, for which {} has no class", self.name))
        })
    }
}

fn of_lines(text: &str) -> Result<HashMap<String, i64>, (usize, String)> {
    let mut classes = HashMap::new();
    for (at, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let parsed = split(line).and_then(|(id, class)| Some((id, class.trim().parse::<i64>().ok()?)));
        let Some((id, class)) = parsed else {
            if at == 0 {
                continue;
            }
            return Err((at + 1, format!("is `{line}`; expected `id,class` with a whole number")));
        };
        if let Some(first) = classes.insert(id.clone(), class)
            && first != class
        {
            return Err((at + 1, format!("gives `{id}` the class {class}; a line before gave it {first}")));
        }
    }
    Ok(classes)
}

/// The first two fields of a CSV line.
fn split(line: &str) -> Option<(String, &str)> {
    let Some(quoted) = line.strip_prefix('"') else {
        let (id, rest) = line.split_once(',')?;
        return Some((id.trim().to_owned(), first_field(rest)));
    };
    let (mut id, mut rest) = (String::new(), quoted);
    loop {
        let (text, after) = rest.split_once('"')?;
        id.push_str(text);
        match after.strip_prefix('"') {
            // A doubled quote stands for one.
            Some(after) => {
                id.push('"');
                rest = after;
            }
            None => return Some((id, first_field(after.trim_start().strip_prefix(',')?))),
        }
    }
}

fn first_field(text: &str) -> &str {
    text.split(',').next().unwrap_or(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn tables_and_objects_give_classes() {
        let folder = tempfile::tempdir().unwrap();
        let read = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            LabelMap::read(path.to_str().unwrap())
        };
        let map = read("a.csv", "id,label,more\na/1.jpg,7,x\n\"b, \"\"c\"\"\", 8\n\n").unwrap();
        assert_eq!((map.classes["a/1.jpg"], map.classes["b, \"c\""], map.classes.len()), (7, 8, 2));
        assert_eq!(read("a.json", r#"{"x": 3}"#).unwrap().class("x", String::new).unwrap(), 3);
        let error = map.class("nobody", || "shard: nobody".into()).unwrap_err().to_string();
        assert!(error.contains("shard: nobody") && error.contains("a.csv"), "{error}");
        for (name, text, says) in [
            ("b.csv", "a,1\nb,two\n", "line 2"),
            ("b.csv", "a,1\na,2\n", "class 2; a line before gave it 1"),
            ("b.json", "[1]", "no object"),
        ] {
            let error = read(name, text).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(name), "{error}");
        }
    }
}
