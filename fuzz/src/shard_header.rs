//! Any bytes as an object of a shard, or any other safetensors file.

use std::collections::BTreeMap;

use checkpoint::SafetensorsHeader;

/// Tells whether the header was accepted.
pub fn run(data: &[u8]) -> bool {
    let Ok(header) = SafetensorsHeader::read(data, data.len() as u64) else {
        return false;
    };
    // What is accepted covers the file exactly once, in the order of the places.
    let mut at = 0;
    let places: BTreeMap<_, _> = header.tensors.values().map(|info| (info.data_offsets, info)).collect();
    for ((start, end), info) in places {
        let bits = info.shape.iter().product::<usize>() * info.dtype.bitsize();
        assert!(start == at || start == end, "a gap or an overlap at {at}: {start}..{end}");
        assert_eq!((end - start) * 8, bits, "{:?} {:?}", info.dtype, info.shape);
        at = end.max(at);
    }
    assert_eq!(header.data_start + at as u64, data.len() as u64);
    // A length that the file does not have is noticed.
    assert!(SafetensorsHeader::read(data, data.len() as u64 + 1).is_err());
    true
}
