//! Goes through a shard's headers once and remembers where each sample's members are.

use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use serde_json::Value;

use crate::DataError;
use crate::convert::Names;
use crate::convert::files::{Place, SeekReader};
use crate::convert::roles::Roles;

const BLOCK_BYTES: u64 = 512;
/// Labels and JSON members; longer ones are not looked at.
const MOST_SMALL_BYTES: u64 = 1 << 20;

/// Where the label of a sample is.
enum LabelMember {
    /// A member with the number as text.
    Text(String),
    /// A field of the JSON member.
    Json(String),
    /// Either `.cls`, or the field `label` of the JSON member, whatever a sample has.
    Usual,
}

/// The members that the samples have; settled by the first one, asked of all.
pub(super) struct Members {
    pub roles: Roles,
    label: LabelMember,
    /// The JSON field with the sample's name.
    id: String,
}

impl Members {
    fn find(names: &Names, extensions: &[&str]) -> Result<Self, String> {
        let label = match names.label.as_deref() {
            None => LabelMember::Usual,
            Some(name) => match name.strip_prefix("json:") {
                Some(field) => LabelMember::Json(field.to_owned()),
                None => LabelMember::Text(name.to_owned()),
            },
        };
        let id = names.id.as_deref().unwrap_or("id");
        Ok(Self {
            roles: Roles::find(names, extensions, ".npy", Some("npy"))?,
            label,
            id: id.strip_prefix("json:").unwrap_or(id).to_owned(),
        })
    }
}

/// A sample of a shard.
pub(super) struct Indexed {
    pub shard: u32,
    pub key: Box<str>,
    /// Its name, where it is not the key.
    own_id: Option<Box<str>>,
    pub label: Option<i64>,
    /// Where the arrays are, in the order of [`Roles::names`].
    pub members: Box<[Range<u64>]>,
}

impl Indexed {
    pub fn id(&self) -> &str {
        self.own_id.as_deref().unwrap_or(&self.key)
    }
}

/// A member of the sample that is being collected.
struct Member {
    extension: String,
    range: Range<u64>,
    /// What a small member holds.
    text: Option<Vec<u8>>,
}

/// Adds a shard's samples to `samples`; `members` is settled by the first sample of all.
pub(super) fn shard(
    number: usize,
    place: &Place,
    names: &Names,
    members: &mut Option<Members>,
    samples: &mut Vec<Indexed>,
) -> Result<(), DataError> {
    let name = place.name();
    let file_bytes = place.bytes()?;
    let mut archive = tar::Archive::new(SeekReader::open(place)?);
    let (mut key, mut collected): (String, Vec<Member>) = (String::new(), Vec::new());
    let mut end = 0;
    let mut last = String::new();
    let broken = |last: &str, error: std::io::Error| {
        let after = if last.is_empty() { "at its first entry".to_owned() } else { format!("after the entry `{last}`") };
        DataError::source(&name, format!("is no whole tar file: {after}: {error}"))
    };
    let mut finish = |key: &str, collected: &mut Vec<Member>| {
        if collected.is_empty() {
            return Ok(());
        }
        let sample = std::mem::take(collected);
        samples.push(
            indexed(number, key, sample, names, members)
                .map_err(|reason| DataError::source(format!("{name}: sample `{key}`"), reason))?,
        );
        Ok::<_, DataError>(())
    };
    for entry in archive.entries_with_seek().map_err(|error| broken("", error))? {
        let mut entry = entry.map_err(|error| broken(&last, error))?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let start = entry.raw_file_position();
        let bytes = entry.size();
        end = start.saturating_add(bytes);
        if end > file_bytes {
            let reason = format!(
                "is cut short: the entry `{path}` has {bytes} bytes, but {} are left",
                file_bytes - start.min(file_bytes)
            );
            return Err(DataError::source(&name, reason));
        }
        last = path;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        // The key ends at the first dot of the file name.
        let name_start = last.rfind('/').map_or(0, |at| at + 1);
        let Some((stem, extension)) = last[name_start..].split_once('.').filter(|(stem, _)| !stem.is_empty()) else {
            continue;
        };
        let own_key = format!("{}{stem}", last[..name_start].trim_start_matches("./"));
        if own_key != key {
            finish(&key, &mut collected)?;
            key = own_key;
        }
        let extension = extension.to_lowercase();
        let small = bytes <= MOST_SMALL_BYTES && !extension.ends_with("npy");
        let mut text = None;
        if small {
            let mut read = Vec::new();
            entry.read_to_end(&mut read).map_err(|error| broken(&last, error))?;
            text = Some(read);
        }
        if collected.iter().any(|member| member.extension == extension) {
            let reason = format!("the sample `{key}` has two members `.{extension}`; keys must be unique in a shard");
            return Err(DataError::source(&name, reason));
        }
        collected.push(Member { extension, range: start..end, text });
    }
    // Two blocks of zeros end an archive; without one nothing tells whether entries are missing.
    let mut file = SeekReader::open(place)?;
    let mut block = [1; BLOCK_BYTES as usize];
    let ended = file
        .seek(SeekFrom::Start(end.next_multiple_of(BLOCK_BYTES)))
        .and_then(|_| file.read_exact(&mut block))
        .is_ok_and(|()| block == [0; BLOCK_BYTES as usize]);
    if !ended {
        let reason = format!("is cut short: the end of the archive is missing after the entry `{last}`");
        return Err(DataError::source(&name, reason));
    }
    finish(&key, &mut collected)
}

fn indexed(
    shard: usize,
    key: &str,
    sample: Vec<Member>,
    names: &Names,
    members: &mut Option<Members>,
) -> Result<Indexed, String> {
    let members = match members {
        Some(members) => members,
        None => {
            let extensions: Vec<&str> = sample.iter().map(|member| member.extension.as_str()).collect();
            members.insert(Members::find(names, &extensions)?)
        }
    };
    let member = |name: &str| sample.iter().find(|member| member.extension == name);
    let mut ranges = Vec::with_capacity(members.roles.names.len());
    for name in &members.roles.names {
        let found = member(name).ok_or_else(|| format!("has no member `.{name}`, which the first sample has"))?;
        ranges.push(found.range.clone());
    }
    let text = |name: &str| member(name).and_then(|member| member.text.as_deref());
    let json = text("json")
        .map(|text| serde_json::from_slice::<Value>(text).map_err(|error| format!("member `.json`: {error}")))
        .transpose()?;
    let of_text = |name: &str| {
        text(name)
            .map(|text| {
                let text = String::from_utf8_lossy(text);
                let class = text.trim().parse::<i64>();
                class.map_err(|_| format!("member `.{name}` is `{}`; expected a whole number", text.trim()))
            })
            .transpose()
    };
    let of_json = |field: &str| match json.as_ref().and_then(|json| json.get(field)) {
        None => Ok(None),
        Some(value) => value
            .as_i64()
            .map(Some)
            .ok_or_else(|| format!("member `.json`: `{field}` is {value}; expected a whole number")),
    };
    let label = match &members.label {
        LabelMember::Text(name) => Some(of_text(name)?.ok_or_else(|| format!("has no member `.{name}`"))?),
        LabelMember::Json(field) => {
            Some(of_json(field)?.ok_or_else(|| format!("has no member `.json` with `{field}`"))?)
        }
        LabelMember::Usual => match of_text("cls")? {
            Some(label) => Some(label),
            None => of_json("label")?,
        },
    };
    let own_id = json.as_ref().and_then(|json| json.get(&members.id)).and_then(Value::as_str);
    Ok(Indexed {
        shard: shard as u32,
        key: key.into(),
        own_id: own_id.filter(|id| *id != key).map(Into::into),
        label,
        members: ranges.into(),
    })
}
