//! Sets the SONAME of `libmustafar.so`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libmustafar.so.0.1");
}
