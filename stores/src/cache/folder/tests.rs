#![allow(clippy::unwrap_used)]
use super::*;

const LIMIT: u64 = 20 * FILE_BYTES;

fn key(index: u64) -> BlockKey {
    BlockKey::new(&sha2::Digest::new(), index)
}

fn data(index: u64) -> Vec<u8> {
    vec![index as u8; 1 << 20]
}

fn holds(folder: &Folder, index: u64) -> bool {
    let file = folder.read(&key(index)).unwrap();
    file.is_some_and(|file| super::super::block::open(file, &key(index), 1 << 20).unwrap() == data(index))
}

/// Bytes of all files, and how many temporaries are among them.
fn content(dir: &Path) -> (u64, usize) {
    let (mut bytes, mut temporaries) = (0, 0);
    for folder in entries(&dir.join(BLOCKS)).unwrap().into_iter().filter(|path| path.is_dir()) {
        for file in entries(&folder).unwrap() {
            bytes += fs::metadata(&file).unwrap().len();
            temporaries += usize::from(file.extension().is_some_and(|kind| kind == ON_ITS_WAY));
        }
    }
    (bytes, temporaries)
}

fn set_age(path: &Path, seconds: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(seconds)).unwrap();
}

#[test]
fn what_was_used_last_stays_and_the_bound_holds() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path(), LIMIT).unwrap();
    for index in 0..20 {
        folder.write(&key(index), &data(index)).unwrap();
        set_age(&key(index).file(&folder.blocks), 10_000 - index);
    }
    assert!((0..20).all(|index| key(index).file(&folder.blocks).exists()));
    assert!(holds(&folder, 0));
    for index in 20..30 {
        folder.write(&key(index), &data(index)).unwrap();
        assert!(content(dir.path()).0 <= LIMIT);
    }
    assert!(holds(&folder, 0), "it was used a moment ago");
    assert!((1..9).all(|index| !holds(&folder, index)));
    assert!((14..30).all(|index| holds(&folder, index)));
}

#[test]
fn a_smaller_bound_and_a_spoilt_ledger_are_settled_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path(), LIMIT).unwrap();
    (0..20).for_each(|index| folder.write(&key(index), &data(index)).unwrap());
    let folder = Folder::open(dir.path(), LIMIT / 2).unwrap();
    assert!(content(dir.path()).0 <= LIMIT / 2);
    for garbage in [&b""[..], b"nonsense", &[7; 16], &[0; 4000]] {
        fs::write(dir.path().join(BLOCKS).join("ledger"), garbage).unwrap();
        (0..20).for_each(|index| folder.write(&key(index), &data(index)).unwrap());
        let used = content(dir.path()).0;
        assert!(used <= LIMIT / 2 && used > LIMIT / 4, "{used} bytes after {garbage:?}");
    }
}

#[test]
fn leftovers_of_killed_processes_go_and_other_files_stay() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path(), LIMIT).unwrap();
    folder.write(&key(1), &data(1)).unwrap();
    let beside = key(1).file(&folder.blocks);
    let (fresh, old, foreign) =
        (beside.with_file_name("1-a.tmp"), beside.with_file_name("2-b.tmp"), dir.path().join("mine"));
    [&fresh, &old, &foreign].iter().for_each(|path| fs::write(path, b"half").unwrap());
    set_age(&old, 3600);
    set_age(&foreign, 3600);
    let folder = Folder::open(dir.path(), LIMIT).unwrap();
    assert!(fresh.exists() && !old.exists() && foreign.exists() && holds(&folder, 1));
    // The fresh one counts as what it may become.
    let used = Ledger::lock(&folder.blocks, PATIENCE).unwrap().unwrap().read().unwrap();
    assert_eq!(used, Some(2 * FILE_BYTES));
}

#[test]
fn a_block_that_finds_no_space_or_no_ledger_is_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Folder::open(dir.path(), FILE_BYTES).unwrap();
    folder.write(&key(1), &data(1)).unwrap();
    // Somebody's file on its way takes all there is.
    fs::write(key(1).file(&folder.blocks).with_file_name("1-a.tmp"), b"half").unwrap();
    folder.write(&key(2), &data(2)).unwrap();
    assert!(!holds(&folder, 2));
    assert!(Folder::open(&dir.path().join("blocks-1/ledger"), LIMIT).is_err(), "not a folder");
    let held = Ledger::lock(&folder.blocks, PATIENCE).unwrap();
    assert!(Ledger::lock(&folder.blocks, Duration::ZERO).unwrap().is_none());
    drop(held);
}
