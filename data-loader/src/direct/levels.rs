//! Whether a page's repetition and definition levels say that every list has the length it must have, without a null.

/// What a page of whole rows says at each level.
#[derive(Clone, Debug)]
pub(super) struct Expected {
    /// Lengths of the list levels from the outside; empty where a row is one value.
    pub dims: Vec<usize>,
    pub most_definition: u16,
}

impl Expected {
    /// Values of one row.
    pub fn values(&self) -> usize {
        self.dims.iter().product()
    }

    /// Whether `bytes` hold exactly the repetition levels of `count` values from the start of a row on.
    pub fn repetition_is(&self, bytes: &[u8], count: usize) -> bool {
        let (numel, last) = (self.values(), self.dims.last().copied().unwrap_or(1));
        holds(bytes, self.dims.len() as u16, count, |at| {
            let in_row = at % numel;
            if !in_row.is_multiple_of(last) {
                return (self.dims.len() as u16, last - in_row % last);
            }
            // The outermost level of which a list begins here.
            let mut inner = numel;
            let level = self.dims.iter().position(|dim| {
                let starts = in_row.is_multiple_of(inner);
                inner /= dim;
                starts
            });
            (level.unwrap_or(self.dims.len()) as u16, 1)
        })
    }

    /// Whether `bytes` say of `count` values that none is null.
    pub fn definition_is(&self, bytes: &[u8], count: usize) -> bool {
        holds(bytes, self.most_definition, count, |at| (self.most_definition, count - at))
    }
}

/// Whether a stretch of run-length-encoded and bit-packed levels up to `most` holds `count` levels that are as `expected`, which
/// tells the level at a position and how many from there on are the same.
fn holds(mut bytes: &[u8], most: u16, count: usize, expected: impl Fn(usize) -> (u16, usize)) -> bool {
    let width = (u16::BITS - most.leading_zeros()) as usize;
    let mut at = 0;
    while at < count {
        let Some((header, rest)) = varint(bytes) else { return false };
        bytes = rest;
        if header & 1 == 0 {
            let value_bytes = width.div_ceil(8);
            let Some((value, rest)) = bytes.split_at_checked(value_bytes) else { return false };
            bytes = rest;
            let value = value.iter().rev().fold(0, |value, byte| value << 8 | u16::from(*byte));
            let end = count.min(at.saturating_add((header >> 1) as usize));
            if end == at {
                return false;
            }
            while at < end {
                let (level, same) = expected(at);
                if level != value {
                    return false;
                }
                at += same.min(end - at);
            }
        } else {
            let groups = (header >> 1) as usize;
            let Some((packed, rest)) = groups.checked_mul(width).and_then(|length| bytes.split_at_checked(length))
            else {
                return false;
            };
            bytes = rest;
            let end = count.min(at + groups * 8);
            if end == at {
                return false;
            }
            for (index, at) in (at..end).enumerate() {
                let bit = |bit: usize| u16::from(packed[bit / 8] >> (bit % 8) & 1);
                let value = (0..width).fold(0, |value, place| value | bit(index * width + place) << place);
                if value != expected(at).0 {
                    return false;
                }
            }
            at = end;
        }
    }
    true
}

fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut number = 0;
    for (at, byte) in bytes.iter().enumerate().take(9) {
        number |= u64::from(byte & 0x7f) << (7 * at);
        if byte & 0x80 == 0 {
            return Some((number, &bytes[at + 1..]));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flat(numel: usize) -> Expected {
        Expected { dims: vec![numel], most_definition: 1 }
    }

    #[test]
    fn runs_and_packed_bits_are_the_levels_they_say() {
        // Two rows of ten: packed 0,1×7, then a run of two ones; twice.
        let levels = [0x03, 0b1111_1110, 0x04, 1, 0x03, 0b1111_1110, 0x04, 1];
        assert!(flat(10).repetition_is(&levels, 20));
        assert!(!flat(5).repetition_is(&levels, 20), "rows of another length");
        assert!(!flat(10).repetition_is(&levels[..6], 20), "cut off");
        assert!(flat(10).repetition_is(&levels[..4], 10));
        assert!(flat(10).definition_is(&[0x28, 1], 20));
        assert!(!flat(10).definition_is(&[0x26, 1, 0x02, 0], 20), "the last is null");
        assert!(!flat(10).definition_is(&[0x00, 1], 20), "a run of nothing");
        assert!(!flat(10).definition_is(&[0x01], 20), "no packed group");
        assert!(!flat(10).definition_is(&[0xff; 12], 20));
    }

    #[test]
    fn nested_lists_begin_where_the_shape_says() {
        // 2 × 3: levels 0 2 2 1 2 2, two bits each, in one packed group of eight with two to spare.
        let levels = [0b01_10_10_00u8, 0b0000_1010, 0x05];
        let packed = [0x03, levels[0], levels[1]];
        let nested = Expected { dims: vec![2, 3], most_definition: 2 };
        assert!(nested.repetition_is(&packed, 6));
        assert!(!Expected { dims: vec![3, 2], most_definition: 2 }.repetition_is(&packed, 6));
    }
}
