//! What the fuzz targets do with their bytes. The default tests include the same files and replay `corpus/` through them.

pub mod manifest;
pub mod parquet_bytes;
pub mod shard_header;

/// Lets panics of other crates through to where ours catch them; a panic in our own code ends the process, caught or not.
pub fn watch_own_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let file = panic.location().map_or("", |place| place.file());
        if ["checkpoint/src", "data-loader/src", "stores/src", "configs/src", "fuzz/src"]
            .iter()
            .any(|own| file.contains(own))
        {
            eprintln!("{panic}\n{}", std::backtrace::Backtrace::force_capture());
            std::process::abort();
        }
    }));
}
