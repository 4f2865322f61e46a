//! The form before PyTorch 1.6: five pickles (magic number, protocol, system, object, storage keys), then the storages,
//! each behind its number of elements.

use super::pickle::{Node, Pickle};
use super::rebuild::Storage;
use super::{Contents, Place, malformed, of_pickle};
use crate::interop::InteropError;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// 0x1950a86a20f9469cfc6c, which PyTorch writes first.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;

/// Reads the pickles and finds the storages.
pub(super) fn read(mut file: &File, path: &Path) -> Result<Contents, InteropError> {
    let file_bytes = file.metadata().map_err(InteropError::io(path, "open"))?.len();
    file.seek(SeekFrom::Start(0)).map_err(InteropError::io(path, "read"))?;
    let mut reader = BufReader::new(file);
    let mut at = 0;
    let mut next = || {
        let (pickle, bytes) = Pickle::read(&mut reader).map_err(of_pickle(path))?;
        at += bytes;
        Ok::<_, InteropError>((pickle, at))
    };
    let (magic, _) = next()?;
    if !matches!(magic.root(), Node::Bytes(bytes) if *bytes == MAGIC) {
        return Err(malformed(path, "a pickle, but not one of torch.save".to_owned()));
    }
    let (protocol, _) = next()?;
    if *protocol.root() != Node::Int(PROTOCOL) {
        return Err(malformed(path, format!("protocol {:?}; expected {PROTOCOL}", protocol.root())));
    }
    let (system, _) = next()?;
    let is_little = |&(key, value): &_| {
        (system.get(key) == &Node::Str("little_endian".to_owned())).then(|| *system.get(value) == Node::Bool(true))
    };
    let big_endian = system.entries(system.root()).iter().find_map(is_little) == Some(false);
    let (pickle, _) = next()?;
    let (keys, mut at) = next()?;
    let Node::List(key_ids) = keys.root() else {
        return Err(malformed(path, "its list of storages is no list".to_owned()));
    };

    let storages: HashMap<&str, &Storage> = pickle
        .nodes()
        .filter_map(|node| if let Node::Storage(storage) = node { Some((storage.key.as_str(), storage)) } else { None })
        .collect();
    let mut places = HashMap::new();
    for &id in key_ids {
        let Node::Str(key) = keys.get(id) else {
            return Err(malformed(path, "a storage whose key is no string".to_owned()));
        };
        let unknown = || malformed(path, format!("storage `{key}` belongs to no tensor"));
        let storage = storages.get(key.as_str()).ok_or_else(unknown)?;
        let mut count = [0; 8];
        let short = |_| malformed(path, format!("it is cut short before storage `{key}`"));
        file.read_exact_at(&mut count, at).map_err(short)?;
        let numel = if big_endian { u64::from_be_bytes(count) } else { u64::from_le_bytes(count) };
        let element_bytes = storage.dtype.map_or(1, |dtype| dtype.bitsize() as u64 / 8);
        let bytes = numel.checked_mul(element_bytes).filter(|&bytes| bytes <= file_bytes - at - 8);
        let (Some(bytes), true) = (bytes, numel == storage.numel) else {
            let found =
                format!("storage `{key}` of {numel} elements at byte {at}; its tensors tell of {}", storage.numel);
            return Err(malformed(path, format!("{found}, and the file has {file_bytes} bytes")));
        };
        places.insert(key.clone(), Place { offset: at + 8, bytes, crc32: None });
        at += 8 + bytes;
    }
    Ok(Contents { pickle, places, big_endian })
}
