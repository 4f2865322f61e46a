//! Compiles the small C++ file that adds to `tch` what it lacks, against the same libtorch.

fn main() {
    println!("cargo::rerun-if-changed=src/ffi/torch_ext.cpp");
    println!("cargo::rerun-if-env-changed=LIBTORCH");
    let Ok(libtorch) = std::env::var("LIBTORCH") else {
        panic!("LIBTORCH is not set: build from the repository (its .cargo/config.toml sets it), after ./dev setup");
    };
    let include = std::path::Path::new(&libtorch).join("include");
    if !include.is_dir() {
        panic!("{}: no such folder; ./dev setup makes .venv with libtorch in it", include.display());
    }
    // Where ./dev bundle puts libtorch.
    println!("cargo::rustc-link-arg-bins=-Wl,-rpath,$ORIGIN/../lib/torch/lib");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .flag_if_supported("-Wno-unused-parameter")
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .warnings(false)
        .file("src/ffi/torch_ext.cpp")
        .compile("ditharos_torch_ext");
}
