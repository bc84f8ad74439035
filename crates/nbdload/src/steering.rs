//! When a load begins and ends, as told over stdin: a line begins it, the end of stdin ends it. So that its figures are of the
//! time in which something else ran, and of nothing before or after it.

use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Told by one thread, looked at by those that make the load.
#[derive(Default)]
pub struct Steering {
    over: AtomicBool,
}

impl Steering {
    /// Waits for the first line on stdin, and follows it from then on.
    pub fn by_stdin() -> Arc<Steering> {
        let mut lines = std::io::stdin().lines();
        let _ = lines.next();
        let steering = Arc::new(Steering::default());
        let told = steering.clone();
        std::thread::spawn(move || told.follow(std::io::stdin().lock()));
        steering
    }

    fn follow(&self, input: impl BufRead) {
        input.lines().map_while(Result::ok).for_each(drop);
        self.over.store(true, Ordering::Relaxed);
    }

    /// Whether no more is to be begun.
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn over_at_the_end_of_the_input() {
        let s = Steering::default();
        assert!(!s.is_over());
        s.follow(&b"go\non\n"[..]);
        assert!(s.is_over());
    }
}
