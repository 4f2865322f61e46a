//! How MDS stores a value of a column.

use crate::Dtype;
use crate::convert::array::{Array, Element};
use crate::form::shape_numel;

/// How the arrays of a column are stored.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ArrayEncoding {
    /// `None`: each value says its own.
    element: Option<Element>,
    /// `None`: each value says its own.
    shape: Option<Vec<usize>>,
}

/// Codes of the number types in values that say their own.
const CODES: [(u8, &str); 11] = [
    (8, "uint8"),
    (9, "int8"),
    (16, "uint16"),
    (17, "int16"),
    (18, "float16"),
    (32, "uint32"),
    (33, "int32"),
    (34, "float32"),
    (64, "uint64"),
    (65, "int64"),
    (66, "float64"),
];

impl ArrayEncoding {
    /// `ndarray`, `ndarray:float16`, `ndarray:float16:4,32,32`, or `bytes` with a shape and number type from elsewhere.
    ///
    /// # Errors
    /// With the words for a message.
    pub fn parse(text: &str, shape: Option<&[usize]>, dtype: Option<Dtype>) -> Result<Self, String> {
        if text == "bytes" {
            return match (shape, dtype) {
                (Some(shape), Some(dtype)) => {
                    Ok(Self { element: Some(Element::Float(dtype)), shape: Some(shape.to_vec()) })
                }
                _ => Err("is stored as bytes; say what they are with --shape 4,32,32 and --bytes-dtype f16".into()),
            };
        }
        let refuse = || format!("is stored as {text}; expected ndarray or bytes");
        let mut parts = text.split(':');
        if parts.next() != Some("ndarray") {
            return Err(refuse());
        }
        let element = parts.next().map(|name| Element::parse(name).ok_or_else(refuse)).transpose()?;
        let shape = parts.next().map(|dims| dims.split(',').map(|dim| dim.trim().parse().ok()).collect());
        let shape: Option<Vec<usize>> = shape.map(|shape: Option<Vec<usize>>| shape.ok_or_else(refuse)).transpose()?;
        if shape.as_ref().is_some_and(|shape| shape_numel(shape).is_none()) || parts.next().is_some() {
            return Err(refuse());
        }
        Ok(Self { element, shape })
    }

    /// Reads a value.
    ///
    /// # Errors
    /// With the words for a message.
    pub fn read(&self, value: &[u8]) -> Result<Array, String> {
        let short = || format!("is cut short: it has {} bytes", value.len());
        let mut rest = value;
        let element = match self.element {
            Some(element) => element,
            None => {
                let (code, after) = rest.split_first().ok_or_else(short)?;
                rest = after;
                let name = CODES.iter().find(|(other, _)| other == code).map(|(_, name)| *name);
                name.and_then(Element::parse).ok_or_else(|| format!("has the unknown number type {code}"))?
            }
        };
        let shape = match &self.shape {
            Some(shape) => shape.clone(),
            None => {
                // The number of axes, and in the lowest two bits the bytes of a length.
                let (about, after) = rest.split_first().ok_or_else(short)?;
                let (axes, dim_bytes) = (usize::from(about >> 2), 1 << (about & 3));
                let (dims, after) = after.split_at_checked(axes * dim_bytes).ok_or_else(short)?;
                rest = after;
                let dims = Element::Unsigned(dim_bytes).integers(dims)?;
                dims.into_iter().map(|dim| dim as usize).collect()
            }
        };
        Array::of(element, shape, rest)
    }
}

/// How the integers of a column are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IntEncoding {
    Binary(Element),
    /// `str_int`: digits.
    Text,
}

impl IntEncoding {
    /// `None` for what is no integer.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "int" => Some(Self::Binary(Element::Signed(8))),
            "str_int" => Some(Self::Text),
            _ => match Element::parse(text) {
                Some(element @ (Element::Signed(_) | Element::Unsigned(_))) => Some(Self::Binary(element)),
                _ => None,
            },
        }
    }

    /// Reads a value.
    ///
    /// # Errors
    /// With the words for a message.
    pub fn read(self, value: &[u8]) -> Result<i64, String> {
        match self {
            Self::Text => {
                let text = String::from_utf8_lossy(value);
                text.trim().parse().map_err(|_| format!("is `{text}`; expected a whole number"))
            }
            Self::Binary(element) if value.len() == element.bytes() => Ok(element.integers(value)?[0]),
            Self::Binary(element) => Err(format!("has {} bytes; expected {}", value.len(), element.bytes())),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn arrays_of_all_encodings_are_read() {
        let halves: Vec<u8> = [1.0f32, -2.0].iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
        let with = |front: &[u8]| [front, &halves].concat();
        for (encoding, bytes) in [
            ("ndarray:float16:2,1", with(&[])),
            ("ndarray:float16", with(&[2 << 2, 2, 1])),
            ("ndarray", with(&[18, (2 << 2) | 1, 2, 0, 1, 0])),
            ("bytes", with(&[])),
        ] {
            let encoding = ArrayEncoding::parse(encoding, Some(&[2, 1]), Some(Dtype::F16)).unwrap();
            let read = encoding.read(&bytes).unwrap();
            assert_eq!((&read.shape[..], &read.numbers[..]), (&[2, 1][..], &[1.0, -2.0][..]));
            for cut in 0..bytes.len() {
                assert!(encoding.read(&bytes[..cut]).is_err(), "{encoding:?} cut to {cut}");
            }
        }
        for text in ["jpeg", "pkl", "ndarray:float99", "ndarray:float16:2,x", "ndarray:float16:0", "ndarray:a:b:c"] {
            assert!(ArrayEncoding::parse(text, None, None).unwrap_err().contains(text));
        }
        assert!(ArrayEncoding::parse("bytes", None, None).unwrap_err().contains("--shape"));
    }

    #[test]
    fn integers_of_all_encodings_are_read() {
        for (encoding, bytes) in
            [("int", &7i64.to_le_bytes()[..]), ("uint16", &[7, 0]), ("int8", &[7]), ("str_int", b"7")]
        {
            assert_eq!(IntEncoding::parse(encoding).unwrap().read(bytes).unwrap(), 7);
        }
        assert_eq!(IntEncoding::parse("float32"), None);
        assert!(IntEncoding::parse("int").unwrap().read(&[1]).is_err());
    }
}
