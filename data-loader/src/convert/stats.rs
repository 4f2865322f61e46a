//! Mean and standard deviation per channel, as LightningDiT keeps them: `latents_stats.pt`, a torch file of a dict with two
//! tensors, or a JSON file `{"mean": […], "std": […]}`.
//!
//! Of Python's pickle only what such a dict needs is understood; nothing is ever called.

use std::collections::HashMap;
use std::io::{Cursor, Read};

use npyz::zip::ZipArchive;
use serde::Deserialize;

use super::array::Element;
use super::files::Place;
use crate::{DataError, Dtype};

/// Two short tensors; far more than any number of channels.
const MOST_BYTES: u64 = 16 << 20;
const MOST_VALUES: usize = 10_000;
const MOST_NAME_BYTES: usize = 1000;

#[derive(Deserialize)]
struct Stats {
    mean: Vec<f64>,
    std: Vec<f64>,
}

/// Reads the mean and the standard deviation of each of `channels` channels.
///
/// # Errors
/// If the file holds something else.
pub(super) fn read(place: &Place, channels: usize) -> Result<(Vec<f64>, Vec<f64>), DataError> {
    let refuse = |reason: String| DataError::source(place.name(), format!("holds no channel statistics: {reason}"));
    let bytes = place.read(MOST_BYTES)?;
    let stats = if place.file_name().ends_with(".json") {
        serde_json::from_slice(&bytes).map_err(|error| refuse(error.to_string()))?
    } else {
        of_torch_file(bytes).map_err(refuse)?
    };
    if stats.mean.len() != channels || stats.std.len() != channels {
        let found = format!("{} means and {} deviations", stats.mean.len(), stats.std.len());
        return Err(refuse(format!("{found}; expected one of each for {channels} channels")));
    }
    if let Some(bad) = stats.std.iter().find(|std| !(std.is_finite() && **std > 0.0)) {
        return Err(refuse(format!("a standard deviation of {bad}; expected positive numbers")));
    }
    if stats.mean.iter().any(|mean| !mean.is_finite()) {
        return Err(refuse("a mean that is no number".into()));
    }
    Ok((stats.mean, stats.std))
}

fn of_torch_file(bytes: Vec<u8>) -> Result<Stats, String> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|error| format!("no torch file: {error}"))?;
    let names: Vec<String> = archive.file_names().map(str::to_owned).collect();
    let Some(pickle) = names.iter().find(|name| name.ends_with("/data.pkl")) else {
        return Err("no torch file: it has no data.pkl".into());
    };
    let folder = pickle.trim_end_matches("data.pkl").to_owned();
    let mut entry = |name: &str| {
        let mut bytes = Vec::new();
        let file = archive.by_name(name).map_err(|error| format!("{name}: {error}"))?;
        file.take(MOST_BYTES).read_to_end(&mut bytes).map_err(|error| format!("{name}: {error}"))?;
        Ok::<_, String>(bytes)
    };
    let Value::Dict(fields) = unpickle(&entry(pickle)?)? else {
        return Err("it holds no dict".into());
    };
    let mut tensor = |wanted: &str| {
        let found = fields.iter().find(|(key, _)| matches!(key, Value::Text(name) if name == wanted));
        let Some((_, Value::Tensor { storage, first, numel })) = found else {
            return Err(format!("no tensor `{wanted}`"));
        };
        let Value::Storage { element, file } = &**storage else { return Err(format!("`{wanted}` has no storage")) };
        let bytes = entry(&format!("{folder}data/{file}"))?;
        let range = first.checked_mul(element.bytes()).zip(numel.checked_mul(element.bytes()));
        let range = range.and_then(|(start, length)| Some(start..start.checked_add(length)?));
        let bytes = range.and_then(|range| bytes.get(range)).ok_or_else(|| format!("`{wanted}` is cut short"))?;
        match element {
            Element::F64 => Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect()),
            element => Ok(element.floats(bytes)?.into_iter().map(f64::from).collect()),
        }
    };
    Ok(Stats { mean: tensor("mean")?, std: tensor("std")? })
}

#[derive(Clone, Debug)]
enum Value {
    Mark,
    /// Whatever is of no use here.
    Other,
    Int(usize),
    Text(String),
    Global(String),
    Tuple(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Storage {
        element: Element,
        file: String,
    },
    Tensor {
        storage: Box<Value>,
        first: usize,
        numel: usize,
    },
}

/// The value of a pickle of protocol 2, as torch writes it.
fn unpickle(bytes: &[u8]) -> Result<Value, String> {
    let mut rest = bytes;
    let mut stack: Vec<Value> = Vec::new();
    let mut memo: HashMap<u32, Value> = HashMap::new();
    let short = || "its pickle is cut short".to_owned();
    for _ in 0..MOST_VALUES {
        let mut take = |count: usize| {
            let (taken, after) = rest.split_at_checked(count).ok_or_else(short)?;
            rest = after;
            Ok::<_, String>(taken)
        };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
        let code = take(1)?[0];
        match code {
            0x80 => drop(take(1)?),
            b'.' => return stack.pop().ok_or_else(short),
            b'(' => stack.push(Value::Mark),
            b'}' => stack.push(Value::Dict(Vec::new())),
            b')' => stack.push(Value::Tuple(Vec::new())),
            b'N' | 0x88 | 0x89 => stack.push(Value::Other),
            b'K' | b'M' | b'J' => {
                let value = number(take(match code {
                    b'K' => 1,
                    b'M' => 2,
                    _ => 4,
                })?);
                stack.push(Value::Int(value as usize));
            }
            b'X' => {
                let length = number(take(4)?) as usize;
                stack.push(Value::Text(String::from_utf8_lossy(take(length)?).into_owned()));
            }
            b'q' | b'r' | b'h' | b'j' => {
                let key = number(take(if matches!(code, b'q' | b'h') { 1 } else { 4 })?) as u32;
                if matches!(code, b'q' | b'r') {
                    // Only what is small is asked for again; copies of copies could grow without bound.
                    let value = match stack.last().ok_or_else(short)? {
                        Value::Text(text) | Value::Global(text) if text.len() > MOST_NAME_BYTES => Value::Other,
                        value @ (Value::Int(_) | Value::Text(_) | Value::Global(_)) => value.clone(),
                        _ => Value::Other,
                    };
                    memo.insert(key, value);
                } else {
                    stack.push(memo.get(&key).cloned().ok_or_else(short)?);
                }
            }
            b'c' => {
                let mut line = || {
                    let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(short)?;
                    let (text, after) = rest.split_at(end);
                    rest = &after[1..];
                    Ok::<_, String>(String::from_utf8_lossy(text).into_owned())
                };
                stack.push(Value::Global(format!("{}.{}", line()?, line()?)));
            }
            b't' => {
                let items = since_mark(&mut stack).ok_or_else(short)?;
                stack.push(Value::Tuple(items));
            }
            0x85..=0x87 => {
                let start = stack.len().checked_sub(usize::from(code - 0x84)).ok_or_else(short)?;
                let items = stack.split_off(start);
                stack.push(Value::Tuple(items));
            }
            b'Q' => {
                let storage = stack.pop().and_then(|value| storage(&value));
                stack.push(storage.ok_or("its pickle refers to something else than a storage")?);
            }
            b'R' => {
                let (arguments, function) = (stack.pop().ok_or_else(short)?, stack.pop().ok_or_else(short)?);
                let value = match (&function, &arguments) {
                    (Value::Global(name), Value::Tuple(items)) if name == "torch._utils._rebuild_tensor_v2" => {
                        tensor(items).ok_or("it holds a tensor of another kind")?
                    }
                    (Value::Global(name), _) if name == "collections.OrderedDict" => Value::Other,
                    _ => return Err(format!("its pickle calls {function:?}")),
                };
                stack.push(value);
            }
            b's' | b'u' => {
                let items = match code {
                    b's' => stack.split_off(stack.len().checked_sub(2).ok_or_else(short)?),
                    _ => since_mark(&mut stack).ok_or_else(short)?,
                };
                let Some(Value::Dict(fields)) = stack.last_mut() else { return Err(short()) };
                fields.extend(items.chunks_exact(2).map(|pair| (pair[0].clone(), pair[1].clone())));
            }
            other => return Err(format!("its pickle has the unexpected code {other:#04x}")),
        }
    }
    Err("its pickle is too long".into())
}

fn since_mark(stack: &mut Vec<Value>) -> Option<Vec<Value>> {
    let at = stack.iter().rposition(|value| matches!(value, Value::Mark))?;
    let items = stack.split_off(at + 1);
    stack.pop();
    Some(items)
}

/// `("storage", torch.FloatStorage, "0", "cpu", 32)`.
fn storage(value: &Value) -> Option<Value> {
    let Value::Tuple(items) = value else { return None };
    let [_, Value::Global(kind), Value::Text(file), ..] = &items[..] else { return None };
    let element = match kind.strip_prefix("torch.")? {
        "FloatStorage" => Element::Float(Dtype::F32),
        "HalfStorage" => Element::Float(Dtype::F16),
        "BFloat16Storage" => Element::Float(Dtype::Bf16),
        "DoubleStorage" => Element::F64,
        _ => return None,
    };
    Some(Value::Storage { element, file: file.clone() })
}

/// `(storage, first, size, stride, …)`, contiguous.
fn tensor(items: &[Value]) -> Option<Value> {
    let [storage @ Value::Storage { .. }, Value::Int(first), Value::Tuple(size), Value::Tuple(stride), ..] = items
    else {
        return None;
    };
    let dim = |value: &Value| match value {
        Value::Int(dim) => Some(*dim),
        _ => None,
    };
    let size: Vec<usize> = size.iter().map(dim).collect::<Option<_>>()?;
    let stride: Vec<usize> = stride.iter().map(dim).collect::<Option<_>>()?;
    let mut numel = 1usize;
    for (&size, &stride) in size.iter().zip(&stride).rev() {
        if size != 1 && stride != numel {
            return None;
        }
        numel = numel.checked_mul(size)?;
    }
    Some(Value::Tensor { storage: Box::new(storage.clone()), first: *first, numel })
}
