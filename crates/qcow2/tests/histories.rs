//! Random histories, judged by `qemu-img`. `LIVEBLK_SEED` sets the first seed, `LIVEBLK_HISTORIES` how many.

#[test]
fn histories_equal_the_model_and_qemu_agrees() {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let (first, n) = (number("LIVEBLK_SEED", 1), number("LIVEBLK_HISTORIES", 60));
    let dir = std::path::Path::new("/dev/shm").join(format!("liveblk-qcow2-{}", std::process::id()));
    let result = qcow2::testing::history::run_seeds(&dir, first..first + n);
    match result {
        Ok(done) => {
            assert_eq!(done, n);
            std::fs::remove_dir_all(&dir).unwrap();
        }
        Err(e) => panic!("{e}"),
    }
}
