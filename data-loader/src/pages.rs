//! The pages of a column chunk: their headers, without decoding them.
//!
//! A page header is a struct of Thrift's compact protocol; the parquet crate keeps its reader for them to itself.
//! Format: <https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift> (`PageHeader`) and
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>.

/// How deeply structs and lists may nest in what is skipped.
const MAX_DEPTH: usize = 16;
/// The protocol's number for a struct.
const STRUCT: u8 = 12;

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    Data,
    Dictionary,
    /// Of an index, or of a kind that is not known.
    Other,
}

/// A page as its header tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Page {
    pub kind: PageKind,
    /// Where its bytes begin in the chunk, behind the header.
    pub start: usize,
    /// Their length.
    pub bytes: usize,
    /// Their length when decompressed.
    pub decoded_bytes: usize,
    /// CRC-32 of the bytes as stored.
    pub crc: Option<u32>,
    /// Values in it, nulls included.
    pub values: usize,
    /// How a data page's bytes are arranged.
    pub layout: Option<Layout>,
}

/// How levels and values lie in a data page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Values are stored plainly.
    pub plain: bool,
    pub levels: Levels,
}

/// Where the levels are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Levels {
    /// Version 1: each kind has its length in four bytes before it; `rle` if both are so encoded.
    Prefixed { rle: bool },
    /// Version 2: repetition levels, then definition levels.
    Sized { repetition_bytes: usize, definition_bytes: usize },
}

/// The page that `bytes` begin with, as its header tells; its bytes need not be there.
pub(crate) fn header(bytes: &[u8]) -> Option<Page> {
    let mut input = Compact { bytes, at: 0 };
    let header = Header::read(&mut input)?;
    header.page(input.at)
}

/// The pages of a column chunk, one after the other; last, where the bytes are no whole page, an error that tells where.
pub(crate) fn pages(chunk: &[u8]) -> impl Iterator<Item = Result<Page, String>> {
    let (mut at, mut number) = (0, 0);
    std::iter::from_fn(move || {
        if at == chunk.len() {
            return None;
        }
        let page = page(chunk, at).map_err(|reason| format!("page {number} at byte {at} of its column chunk {reason}"));
        at = page.as_ref().map_or(chunk.len(), |page| page.start + page.bytes);
        number += 1;
        Some(page)
    })
}

fn page(chunk: &[u8], at: usize) -> Result<Page, String> {
    let mut input = Compact { bytes: chunk, at };
    let header = Header::read(&mut input).ok_or("has no readable header")?;
    header.page(input.at).filter(|page| page.bytes <= chunk.len() - page.start).ok_or_else(|| {
        let number = |number: Option<i64>| number.map_or("unknown".to_owned(), |number| number.to_string());
        format!(
            "claims {} bytes, {} decompressed, of the {} that follow",
            number(header.compressed),
            number(header.uncompressed),
            chunk.len() - input.at
        )
    })
}

#[derive(Default)]
struct Header {
    kind: Option<i64>,
    uncompressed: Option<i64>,
    compressed: Option<i64>,
    crc: Option<i64>,
    /// Fields 1 to 6 of the struct that tells what this kind of page has of its own.
    own: Numbers,
}

type Numbers = [Option<i64>; 6];

/// `Encoding` of the format.
const PLAIN: Option<i64> = Some(0);
const RLE: Option<i64> = Some(3);

impl Header {
    fn read(input: &mut Compact<'_>) -> Option<Self> {
        let mut header = Self::default();
        let mut id = 0i64;
        while let Some((field, kind)) = input.field(id)? {
            id = field;
            let slot = match field {
                1 => &mut header.kind,
                2 => &mut header.uncompressed,
                3 => &mut header.compressed,
                4 => &mut header.crc,
                5 | 7 | 8 if kind == STRUCT => {
                    header.own = input.numbers()?;
                    continue;
                }
                _ => {
                    input.skip(kind, MAX_DEPTH)?;
                    continue;
                }
            };
            *slot = Some(if (4..=6).contains(&kind) { input.zigzag()? } else { return None });
        }
        Some(header)
    }

    fn page(&self, start: usize) -> Option<Page> {
        Some(Page {
            kind: match self.kind? {
                0 | 3 => PageKind::Data,
                2 => PageKind::Dictionary,
                _ => PageKind::Other,
            },
            start,
            bytes: i32::try_from(self.compressed?).ok()?.try_into().ok()?,
            decoded_bytes: i32::try_from(self.uncompressed?).ok()?.try_into().ok()?,
            crc: self.crc.map(|crc| crc as u32),
            // What each kind of page has of its own begins with the number of values.
            values: i32::try_from(self.own[0].unwrap_or(0)).ok()?.try_into().ok()?,
            layout: self.layout(),
        })
    }

    fn layout(&self) -> Option<Layout> {
        let bytes = |number: Option<i64>| usize::try_from(number?).ok();
        match (self.kind?, self.own) {
            (0, [_, encoding, definition, repetition, ..]) => {
                let rle = definition == RLE && repetition == RLE;
                Some(Layout { plain: encoding == PLAIN, levels: Levels::Prefixed { rle } })
            }
            (3, [_, _, _, encoding, definition, repetition]) => {
                let (repetition_bytes, definition_bytes) = (bytes(repetition)?, bytes(definition)?);
                let levels = Levels::Sized { repetition_bytes, definition_bytes };
                Some(Layout { plain: encoding == PLAIN, levels })
            }
            _ => None,
        }
    }
}

/// Reads Thrift's compact protocol. `None` everywhere: the bytes end too early or make no sense.
struct Compact<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Compact<'_> {
    fn byte(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn advance(&mut self, count: u64) -> Option<()> {
        let left = self.bytes.len() - self.at;
        self.at += usize::try_from(count).ok().filter(|count| *count <= left)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    fn zigzag(&mut self) -> Option<i64> {
        let value = self.varint()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Number and type of the next field of a struct; the inner `None` at its end.
    #[allow(clippy::option_option)]
    fn field(&mut self, last_id: i64) -> Option<Option<(i64, u8)>> {
        let head = self.byte()?;
        let (delta, kind) = (i64::from(head >> 4), head & 0x0f);
        match (kind, delta) {
            (0, _) => Some(None),
            (_, 0) => Some(Some((self.zigzag()?, kind))),
            _ => Some(Some((last_id.checked_add(delta)?, kind))),
        }
    }

    /// Reads a struct to its end and gives its fields 1 to 6, as far as they are numbers. The first must be there.
    fn numbers(&mut self) -> Option<Numbers> {
        let (mut id, mut numbers) = (0, Numbers::default());
        while let Some((field, kind)) = self.field(id)? {
            id = field;
            let slot = usize::try_from(field - 1).ok().and_then(|at| numbers.get_mut(at));
            match (slot, kind) {
                (Some(slot), 4..=6) => *slot = Some(self.zigzag()?),
                _ => self.skip(kind, MAX_DEPTH)?,
            }
        }
        numbers[0].map(|_| numbers)
    }

    fn skip(&mut self, kind: u8, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            // Booleans are their own type.
            1 | 2 => Some(()),
            3 => self.advance(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.advance(8),
            8 => self.varint().and_then(|length| self.advance(length)),
            9 | 10 => {
                let head = self.byte()?;
                let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
                self.skip_items(count, head & 0x0f, depth)
            }
            11 => {
                let count = self.varint()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                for _ in 0..count {
                    self.skip_items(1, kinds >> 4, depth)?;
                    self.skip_items(1, kinds & 0x0f, depth)?;
                }
                Some(())
            }
            STRUCT => {
                let mut id = 0;
                while let Some((field, kind)) = self.field(id)? {
                    id = field;
                    self.skip(kind, depth)?;
                }
                Some(())
            }
            _ => None,
        }
    }

    /// Items of a list take a byte where they are booleans; each takes one at least, so the count is bounded by the bytes.
    fn skip_items(&mut self, count: u64, kind: u8, depth: usize) -> Option<()> {
        for _ in 0..count {
            if kind == 1 || kind == 2 { self.advance(1)? } else { self.skip(kind, depth)? }
        }
        Some(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// Fields 1 to 4 as i32, and a struct with the number 4, a binary and a list.
    pub(crate) fn written(kind: u8, bytes: &[u8], decoded: u32, crc: Option<u32>) -> Vec<u8> {
        let varint = |mut value: u64| {
            let mut out = Vec::new();
            while value >= 0x80 {
                out.push(value as u8 | 0x80);
                value >>= 7;
            }
            out.push(value as u8);
            out
        };
        let zigzag = |value: i64| varint(((value << 1) ^ (value >> 63)) as u64);
        let mut out = vec![0x15];
        out.extend(zigzag(kind.into()));
        out.push(0x15);
        out.extend(zigzag(decoded.into()));
        out.push(0x15);
        out.extend(zigzag(bytes.len() as i64));
        if let Some(crc) = crc {
            out.push(0x15);
            out.extend(zigzag((crc as i32).into()));
        }
        out.extend([
            if crc.is_some() { 0x1c } else { 0x2c },
            0x15,
            8,
            0x18,
            2,
            b'a',
            b'b',
            0x19,
            0x25,
            1,
            2,
            0x00,
            0x00,
        ]);
        out.extend(bytes);
        out
    }

    #[test]
    fn headers_are_read_and_the_bytes_between_them_found() {
        let chunk = [
            written(2, b"dictionary", 10, Some(0xdead_beef)),
            written(0, &[7; 300], 600, None),
            written(3, b"", 0, Some(1)),
        ]
        .concat();
        let pages = pages(&chunk).collect::<Result<Vec<_>, _>>().unwrap();
        assert_eq!(
            pages.iter().map(|page| page.kind).collect::<Vec<_>>(),
            [PageKind::Dictionary, PageKind::Data, PageKind::Data]
        );
        assert_eq!(&chunk[pages[0].start..][..pages[0].bytes], b"dictionary");
        assert_eq!((pages[1].bytes, pages[1].decoded_bytes, pages[1].crc), (300, 600, None));
        assert_eq!((pages[0].crc, pages[2].crc, pages[1].values), (Some(0xdead_beef), Some(1), 4));
        assert_eq!(header(&chunk), Some(pages[0]));
    }

    #[test]
    fn data_pages_of_both_versions_tell_where_levels_and_values_are() {
        // Plain, both levels RLE; then with dictionary indexes.
        let first = |encoding| [0x15, 0, 0x15, 8, 0x15, 8, 0x2c, 0x15, 8, 0x15, encoding, 0x15, 6, 0x15, 6, 0, 0];
        let layout = |bytes: &[u8]| header(bytes).unwrap().layout;
        let levels = Levels::Prefixed { rle: true };
        assert_eq!(layout(&first(0)), Some(Layout { plain: true, levels }));
        assert_eq!(layout(&first(16)), Some(Layout { plain: false, levels }));
        // Values, nulls, rows, encoding, and the lengths: definition levels are named first and lie last.
        let second = [0x15, 6, 0x15, 8, 0x15, 8, 0x5c, 0x15, 8, 0x15, 0, 0x15, 8, 0x15, 0, 0x15, 4, 0x15, 10, 0, 0];
        let levels = Levels::Sized { repetition_bytes: 5, definition_bytes: 2 };
        assert_eq!(layout(&second), Some(Layout { plain: true, levels }));
    }

    #[test]
    fn what_is_no_page_is_refused_with_its_place() {
        let error = |chunk: &[u8]| pages(chunk).collect::<Result<Vec<_>, _>>().unwrap_err();
        let good = written(0, b"abc", 3, None);
        for cut in 1..good.len() {
            assert!(error(&good[..cut]).contains("page 0 at byte 0"), "cut at {cut}");
        }
        let second = [&good[..], &[0x1f]].concat();
        assert!(error(&second).contains(&format!("page 1 at byte {}", good.len())));
        assert!(pages(&second).next().unwrap().is_ok());
        // A list that claims 2^63 items, and structs without end.
        error(&[0x59, 0xf3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
        error(&[0x1c; 1 << 16]);
    }
}
