//! Bugs planted on purpose, to test the tests: each re-creates a real defect of this kind of program. Without the feature
//! `planted-bugs` nothing of this is in the code.

#[cfg(feature = "planted-bugs")]
thread_local! {
    static CHOSEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
}

/// Switches one defect on for this thread, by name, or all off.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<&'static str>) {
    CHOSEN.set(bug);
}

/// Whether the defect `bug` is switched on.
#[cfg(feature = "planted-bugs")]
pub fn planted(bug: &str) -> bool {
    CHOSEN.get() == Some(bug)
}

/// Never: this build has no planted bugs.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn planted(_: &str) -> bool {
    false
}
