//! `cargo xtask histories`: random histories of qcow2 images against a byte array, exchanged with and judged by `qemu-img`.

use std::time::Instant;

const HELP: &str = "histories [--count N] [--seed S]";

fn main() {
    if let Err(e) = work() {
        eprintln!("histories: {e}");
        std::process::exit(1);
    }
}

fn work() -> Result<(), String> {
    let (mut count, mut seed) = (1000u64, 1u64);
    let mut args = std::env::args().skip(1);
    while let Some(a) = args.next() {
        let value = args.next().ok_or_else(|| format!("{a} wants a value\n{HELP}"))?;
        let number = value.parse().map_err(|e| format!("{a} {value}: {e}\n{HELP}"))?;
        match a.as_str() {
            "--count" => count = number,
            "--seed" => seed = number,
            other => return Err(format!("unknown option {other}\n{HELP}")),
        }
    }
    let dir = std::env::temp_dir().join(format!("liveblk-histories-{}", std::process::id()));
    std::fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let start = Instant::now();
    let done = qcow2::testing::history::run_seeds(&dir, seed..seed.saturating_add(count));
    let _ = std::fs::remove_dir_all(&dir);
    let done = done?;
    println!(
        "{done} histories in {:.1} s: every read as the byte array says, qemu-img agrees",
        start.elapsed().as_secs_f64()
    );
    Ok(())
}
