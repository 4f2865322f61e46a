//! Which build of a program or library is mapped into this process: the GNU build id that the linker wrote into it.

use std::ffi::{CStr, OsStr, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Type of the note that holds a build id.
const NT_GNU_BUILD_ID: u32 = 3;

/// What this process's own executable (`None`) or the mapped library of that file name is: its build id, or its size in bytes where
/// it has none. Reads mapped memory only, so that it costs nothing at the start of a rank.
pub fn identity(library: Option<&str>) -> String {
    let mut search = Search { library, found: None };
    // SAFETY: the callback gets `search`, which outlives the call, and does not unwind.
    unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut search).cast()) };
    let size = |path: PathBuf| std::fs::metadata(path).map(|file| format!("{} bytes", file.len())).ok();
    match search.found {
        Some(Object { build_id: Some(id), .. }) => format!("build {id}"),
        Some(Object { path, .. }) => size(path).unwrap_or_else(|| "a file that cannot be read".to_owned()),
        None => "not mapped".to_owned(),
    }
}

struct Search<'a> {
    library: Option<&'a str>,
    found: Option<Object>,
}

struct Object {
    path: PathBuf,
    build_id: Option<String>,
}

/// Looks at one mapped object; anything but 0 ends the search.
unsafe extern "C" fn look(info: *mut libc::dl_phdr_info, _size: usize, search: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr hands over a valid object, and the `Search` that `identity` gave it.
    let (info, search) = unsafe { (&*info, &mut *search.cast::<Search>()) };
    let name: &OsStr = match info.dlpi_name.is_null() {
        true => OsStr::new(""),
        // SAFETY: the loader's name of the object, NUL-terminated.
        false => OsStr::from_bytes(unsafe { CStr::from_ptr(info.dlpi_name) }.to_bytes()),
    };
    let path = match search.library {
        // The executable has no name, and so has the kernel's vdso; the executable comes first.
        None => PathBuf::from("/proc/self/exe"),
        Some(library) if Path::new(name).file_name() == Some(OsStr::new(library)) => PathBuf::from(name),
        Some(_) => return 0,
    };
    // SAFETY: the object's program headers, an array of that length.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum)) };
    let build_id = headers.iter().filter(|header| header.p_type == libc::PT_NOTE).find_map(|header| {
        let start = (info.dlpi_addr + header.p_vaddr) as *const u8;
        // SAFETY: a segment of notes is mapped for reading, all of it, as long as the object is.
        let notes = unsafe { std::slice::from_raw_parts(start, header.p_memsz as usize) };
        build_id(notes, header.p_align as usize)
    });
    search.found = Some(Object { path, build_id });
    1
}

/// The build id in a segment of ELF notes: three words (length of name, length of value, type), name, value, both padded.
fn build_id(mut notes: &[u8], align: usize) -> Option<String> {
    let padded = |length: usize| length.checked_next_multiple_of(align.max(4));
    loop {
        let word = |index: usize| Some(u32::from_ne_bytes(notes.get(4 * index..4 * index + 4)?.try_into().ok()?));
        let (name_bytes, value_bytes, kind) = (word(0)? as usize, word(1)? as usize, word(2)?);
        let value_at = padded(name_bytes.checked_add(12)?)?;
        let value = notes.get(value_at..value_at.checked_add(value_bytes)?)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            return Some(value.iter().map(|byte| format!("{byte:02x}")).collect());
        }
        notes = notes.get(padded(value_at + value_bytes)?..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_and_libtorch_are_known_by_their_build_ids() {
        let [program, libtorch] = [identity(None), identity(Some("libtorch_cpu.so"))];
        for found in [&program, &libtorch] {
            let id = found.strip_prefix("build ").expect(found);
            assert!(id.len() >= 16 && id.bytes().all(|digit| digit.is_ascii_hexdigit()), "{found}");
        }
        assert_ne!(program, libtorch);
        assert_eq!(identity(Some("libnothing.so")), "not mapped");
    }

    #[test]
    fn notes_are_read_past_others_and_never_past_their_end() {
        let note = |name: &[u8], kind: u32, value: &[u8]| {
            let mut bytes: Vec<u8> = [name.len() as u32, value.len() as u32, kind].map(u32::to_ne_bytes).concat();
            for part in [name, value] {
                bytes.extend(part);
                bytes.resize(bytes.len().next_multiple_of(4), 0);
            }
            bytes
        };
        let notes = [note(b"stapsdt\0", 3, &[9; 7]), note(b"GNU\0", 3, &[0xab, 1])].concat();
        assert_eq!(build_id(&notes, 4).as_deref(), Some("ab01"));
        assert_eq!(build_id(&note(b"GNU\0", 5, &[1; 4]), 4), None);
        for length in 0..notes.len() - 2 {
            assert_eq!(build_id(&notes[..length], 4), None, "{length}");
        }
        assert_eq!(build_id(&[0xff; 64], 4), None);
    }
}
