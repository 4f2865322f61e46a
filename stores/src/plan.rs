//! Which requests bring the wanted ranges, and the ranges out of what came.

use bytes::{Bytes, BytesMut};
use std::ops::Range;

/// Requests that cover `ranges`: ranges at most `gap` bytes apart become one, and one of more than `most` bytes becomes equal
/// parts. In order, without overlap.
pub(crate) fn requests(ranges: &[Range<u64>], gap: u64, most: u64) -> Vec<Range<u64>> {
    let mut sorted: Vec<Range<u64>> = ranges.iter().filter(|range| !range.is_empty()).cloned().collect();
    sorted.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) <= gap => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged.into_iter().flat_map(|range| split(range, most)).collect()
}

fn split(range: Range<u64>, most: u64) -> impl Iterator<Item = Range<u64>> {
    let bytes = range.end - range.start;
    let part = bytes.div_ceil(bytes.div_ceil(most.max(1)).max(1)).max(1);
    (range.start..range.end).step_by(part as usize).map(move |start| start..range.end.min(start + part))
}

/// The bytes of `range` out of fetched parts, which are in order and cover it. Copies only where it spans several.
pub(crate) fn cut(parts: &[(u64, Bytes)], range: &Range<u64>) -> Bytes {
    if range.is_empty() {
        return Bytes::new();
    }
    let first = parts.partition_point(|(start, bytes)| start + bytes.len() as u64 <= range.start);
    let slice = |(start, bytes): &(u64, Bytes)| {
        let from = range.start.saturating_sub(*start) as usize;
        let to = (range.end - start).min(bytes.len() as u64) as usize;
        bytes.slice(from..to)
    };
    match &parts[first..] {
        [only, ..] if only.0 + only.1.len() as u64 >= range.end => slice(only),
        several => {
            let mut joined = BytesMut::with_capacity((range.end - range.start) as usize);
            several.iter().take_while(|(start, _)| *start < range.end).for_each(|part| joined.extend(slice(part)));
            joined.freeze()
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::single_range_in_vec_init)]
    use super::*;
    use rand::{RngExt, SeedableRng};

    #[test]
    fn near_ranges_are_one_request_and_large_ones_several() {
        assert_eq!(requests(&[], 10, 100), []);
        assert_eq!(requests(&[5..5], 10, 100), []);
        assert_eq!(requests(&[20..30, 0..10], 10, 100), [0..30]);
        assert_eq!(requests(&[21..30, 0..10], 10, 100), [0..10, 21..30]);
        assert_eq!(requests(&[0..250], 10, 100), [0..84, 84..168, 168..250]);
        assert_eq!(requests(&[u64::MAX - 9..u64::MAX], u64::MAX, 4).len(), 3);
    }

    #[test]
    fn whatever_is_asked_for_comes_out() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let object: Vec<u8> = (0..2000).map(|_| rng.random()).collect();
        for _ in 0..500 {
            let wanted: Vec<Range<u64>> = (0..rng.random_range(1..12))
                .map(|_| {
                    let start = rng.random_range(0..2000);
                    start..rng.random_range(start..=2000.min(start + 400))
                })
                .collect();
            let (gap, most) = (rng.random_range(0..100), rng.random_range(1..500));
            let requests = requests(&wanted, gap, most);
            for pair in requests.windows(2) {
                assert!(pair[0].end <= pair[1].start);
            }
            assert!(requests.iter().all(|range| !range.is_empty() && range.end - range.start <= most));
            let fetched: Vec<(u64, Bytes)> = requests
                .iter()
                .map(|range| (range.start, object[range.start as usize..range.end as usize].to_vec().into()))
                .collect();
            for range in &wanted {
                assert_eq!(cut(&fetched, range), object[range.start as usize..range.end as usize]);
            }
        }
    }
}
