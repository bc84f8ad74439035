//! Bugs planted on purpose, to test the tests: each re-creates a real defect of this kind of program. Without the feature
//! `planted-bugs` nothing of this is in the code.

/// The switch of a crate with a feature `planted-bugs`: which of its defects, values of the type given, is on for the current
/// thread. Makes the functions `plant` and `planted`.
#[macro_export]
macro_rules! planted_bugs {
    ($bug:ty) => {
        #[cfg(feature = "planted-bugs")]
        thread_local! {
            static CHOSEN: std::cell::Cell<Option<$bug>> = const { std::cell::Cell::new(None) };
        }

        /// Switches one defect on for this thread, or all off.
        #[cfg(feature = "planted-bugs")]
        pub fn plant(bug: Option<$bug>) {
            CHOSEN.set(bug);
        }

        /// Whether the defect `bug` is switched on.
        #[cfg(feature = "planted-bugs")]
        pub fn planted(bug: $bug) -> bool {
            CHOSEN.get() == Some(bug)
        }

        /// Never: this build has no planted bugs.
        #[cfg(not(feature = "planted-bugs"))]
        #[inline(always)]
        pub const fn planted(_: $bug) -> bool {
            false
        }
    };
}

planted_bugs!(&'static str);
