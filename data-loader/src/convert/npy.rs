//! `.npy` files: numpy's header, then the numbers. Versions 1 to 3 of the format, little-endian, C order.

use super::array::{Array, Element, to_bytes};
use crate::Dtype;

const MAGIC: &[u8] = b"\x93NUMPY";
/// Numpy itself refuses longer ones.
const MAX_HEADER_BYTES: usize = 10_000;

/// What the header tells.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub element: Element,
    pub shape: Vec<usize>,
    /// Where the numbers begin.
    pub data_start: usize,
}

/// Reads floating-point numbers.
///
/// # Errors
/// With the words for a message.
pub(super) fn array(file: &[u8]) -> Result<Array, String> {
    let header = header(file)?;
    Array::of(header.element, header.shape, &file[header.data_start..])
}

/// Reads integers, of any shape.
///
/// # Errors
/// With the words for a message.
pub(super) fn integers(file: &[u8]) -> Result<Vec<i64>, String> {
    let Header { element, shape, data_start } = header(file)?;
    let bytes = &file[data_start..];
    let numel = shape.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim));
    if numel.and_then(|numel| numel.checked_mul(element.bytes())) != Some(bytes.len()) {
        return Err(format!("has {} bytes of {}; its header tells of shape {shape:?}", bytes.len(), element.name()));
    }
    element.integers(bytes)
}

/// Reads the header.
///
/// # Errors
/// With the words for a message.
pub(super) fn header(file: &[u8]) -> Result<Header, String> {
    if !file.starts_with(MAGIC) {
        return Err(match file.len() {
            0..6 => format!("is cut short: it has only {} bytes", file.len()),
            _ => "is no .npy file: it does not begin with \\x93NUMPY".into(),
        });
    }
    let short = || format!("is cut short: its header ends after {} bytes", file.len());
    let (text_start, text_bytes) = match *file.get(6).ok_or_else(short)? {
        1 => {
            let length = file.get(8..10).and_then(|bytes| bytes.first_chunk()).ok_or_else(short)?;
            (10, usize::from(u16::from_le_bytes(*length)))
        }
        2 | 3 => {
            let length = file.get(8..12).and_then(|bytes| bytes.first_chunk()).ok_or_else(short)?;
            (12, u32::from_le_bytes(*length) as usize)
        }
        version => return Err(format!("has version {version} of the .npy format; expected 1, 2 or 3")),
    };
    if text_bytes > MAX_HEADER_BYTES {
        return Err(format!("has a header of {text_bytes} bytes; expected at most {MAX_HEADER_BYTES}"));
    }
    let data_start = text_start + text_bytes;
    let text = file.get(text_start..data_start).ok_or_else(short)?;
    let text = String::from_utf8_lossy(text);
    let fields = fields(text.trim()).ok_or_else(|| format!("has an unreadable header: {}", text.trim()))?;
    let field = |name: &str| {
        let found = fields.iter().find(|(key, _)| *key == name);
        found.map(|(_, value)| *value).ok_or_else(|| format!("has a header without `{name}`: {}", text.trim()))
    };
    let element = element(field("descr")?)?;
    let shape = shape(field("shape")?).ok_or_else(|| format!("has an unreadable shape in {}", text.trim()))?;
    let column_major = field("fortran_order")? == "True";
    if column_major && shape.iter().filter(|&&dim| dim > 1).count() > 1 {
        return Err("is in Fortran order; save it again with np.save(…, np.ascontiguousarray(x))".into());
    }
    Ok(Header { element, shape, data_start })
}

/// The pairs of a Python dict that holds texts, tuples of integers and names.
fn fields(text: &str) -> Option<Vec<(&str, &str)>> {
    let mut rest = text.strip_prefix('{')?.strip_suffix('}')?.trim();
    let mut fields = Vec::new();
    while !rest.is_empty() {
        let quote = rest.chars().next().filter(|quote| matches!(quote, '\'' | '"'))?;
        let (key, after) = rest[1..].split_once(quote)?;
        let after = after.trim_start().strip_prefix(':')?.trim_start();
        // The value ends at the first comma outside of brackets and quotes.
        let (mut depth, mut quoted, mut end) = (0usize, None, after.len());
        for (at, character) in after.char_indices() {
            match (quoted, character) {
                (Some(quote), _) if quote == character => quoted = None,
                (Some(_), _) => {}
                (None, '\'' | '"') => quoted = Some(character),
                (None, '(' | '[') => depth += 1,
                (None, ')' | ']') => depth = depth.checked_sub(1)?,
                (None, ',') if depth == 0 => {
                    end = at;
                    break;
                }
                _ => {}
            }
        }
        fields.push((key, after[..end].trim()));
        rest = after[end..].trim_start_matches(',').trim();
    }
    Some(fields)
}

fn element(descr: &str) -> Result<Element, String> {
    let refuse = || format!("holds numbers of type {descr}; expected '<f2', '<f4', '<f8' or integers, little-endian");
    let code = descr.trim_matches(['\'', '"']);
    let (order, kind) = code.split_at_checked(1).ok_or_else(refuse)?;
    let element = match kind {
        "f2" => Element::Float(Dtype::F16),
        "f4" => Element::Float(Dtype::F32),
        "f8" => Element::F64,
        _ => {
            let (kind, bytes) = kind.split_at_checked(1).ok_or_else(refuse)?;
            let bytes = bytes.parse().ok().filter(|bytes| matches!(bytes, 1 | 2 | 4 | 8)).ok_or_else(refuse)?;
            match kind {
                "i" => Element::Signed(bytes),
                "u" => Element::Unsigned(bytes),
                _ => return Err(refuse()),
            }
        }
    };
    match order {
        "<" | "=" => Ok(element),
        "|" if element.bytes() == 1 => Ok(element),
        _ => Err(refuse()),
    }
}

fn shape(text: &str) -> Option<Vec<usize>> {
    let inside = text.strip_prefix('(')?.strip_suffix(')')?;
    inside.split(',').map(str::trim).filter(|dim| !dim.is_empty()).map(|dim| dim.parse().ok()).collect()
}

/// Writes version 1 of the format. numpy has no bf16: such numbers become f32.
pub(super) fn write(dtype: Dtype, shape: &[usize], parts: &[&[f32]]) -> Vec<u8> {
    let (dtype, descr) = if dtype == Dtype::F16 { (Dtype::F16, "<f2") } else { (Dtype::F32, "<f4") };
    let mut file = header_bytes(descr, shape);
    for numbers in parts {
        to_bytes(dtype, numbers, &mut file);
    }
    file
}

/// Writes one-dimensional int64.
pub(super) fn write_integers(numbers: &[i64]) -> Vec<u8> {
    let mut file = header_bytes("<i8", &[numbers.len()]);
    file.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    file
}

fn header_bytes(descr: &str, shape: &[usize]) -> Vec<u8> {
    let dims: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut text = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}{comma}), }}", dims.join(", "));
    // The numbers begin at a multiple of 64 bytes, and the header ends with a line end.
    while !(10 + text.len() + 1).is_multiple_of(64) {
        text.push(' ');
    }
    text.push('\n');
    // A shape has at most a few axes, so the text stays far below 64 KiB.
    [MAGIC, &[1, 0], &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn file(version: u8, text: &str, data: &[u8]) -> Vec<u8> {
        let length = if version == 1 {
            (text.len() as u16).to_le_bytes().to_vec()
        } else {
            (text.len() as u32).to_le_bytes().to_vec()
        };
        [MAGIC, &[version, 0], &length, text.as_bytes(), data].concat()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let numbers = [1.0f32, -0.5, 65504.0, 0.0, 3.0, 2.0];
        for dtype in [Dtype::F16, Dtype::F32, Dtype::Bf16] {
            let bytes = write(dtype, &[1, 2, 3], &[&numbers[..3], &numbers[3..]]);
            assert!(header(&bytes).unwrap().data_start.is_multiple_of(64));
            let read = array(&bytes).unwrap();
            assert_eq!((&read.shape[..], &read.numbers[..]), (&[1, 2, 3][..], &numbers[..]));
        }
        assert_eq!(integers(&write_integers(&[7, -1])).unwrap(), [7, -1]);
    }

    #[test]
    fn headers_of_all_versions_and_spellings_are_read() {
        let data = 2.5f64.to_le_bytes();
        for text in [
            "{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }",
            "{\"shape\":(1,),\"descr\":\"<f8\",\"fortran_order\":True}",
            "  { 'fortran_order' : False , 'shape' : ( 1 , 1 ) , 'descr' : '<f8' }  \n",
        ] {
            for version in 1..=3 {
                assert_eq!(array(&file(version, text, &data)).unwrap().numbers, [2.5], "{text}");
            }
        }
        let labels = file(1, "{'descr': '|u1', 'fortran_order': False, 'shape': (), }", &[9]);
        assert_eq!(integers(&labels).unwrap(), [9]);
    }

    #[test]
    fn broken_files_are_told_apart() {
        let good = write(Dtype::F32, &[2, 2], &[&[1.0; 4]]);
        let with = |text: &str| file(1, text, &[0; 16]);
        let mut long = file(2, "", &[]);
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        for (bytes, says) in [
            (good[..3].to_vec(), "only 3 bytes"),
            (good[..40].to_vec(), "cut short"),
            (good[..good.len() - 1].to_vec(), "has 15 bytes"),
            (b"PK\x03\x04 not numpy".to_vec(), "no .npy file"),
            (file(9, "", &[]), "version 9"),
            (long, "header of 4294967295 bytes"),
            (with("{'descr': '<f4', 'fortran_order': True, 'shape': (2, 2), }"), "Fortran order"),
            (with("{'descr': '>f4', 'fortran_order': False, 'shape': (2, 2), }"), "'>f4'"),
            (with("{'descr': '|O', 'fortran_order': False, 'shape': (2, 2), }"), "'|O'"),
            (with("{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999, 9999999999), }"), "2^28"),
            (with("{'descr': '<f4', 'fortran_order': False, 'shape': (2, -2), }"), "shape"),
            (with("{'descr': '<f4', 'fortran_order': False }"), "without `shape`"),
            (with("{'descr: 4"), "unreadable header"),
            (with("{'descr': '<i4', 'fortran_order': False, 'shape': (2, 2), }"), "int32"),
        ] {
            let error = array(&bytes).unwrap_err();
            assert!(error.contains(says), "`{says}` not in: {error}");
        }
        assert!(integers(&good).unwrap_err().contains("float32"));
    }
}
