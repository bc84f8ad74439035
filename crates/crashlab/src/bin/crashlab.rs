//! `cargo xtask crash`.
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Err(e) = crashlab::main(&args) {
        eprintln!("crashlab: {e}");
        std::process::exit(1);
    }
}
