//! The nouns: numbers that cannot be mixed up.

use std::fmt;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);
        impl $name {
            /// The next one. There are 2^64; at one a nanosecond they last 500 years, so the end is not handled but kept.
            #[must_use]
            pub const fn next(self) -> $name {
                $name(self.0.saturating_add(1))
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
    };
}

number! {
    /// Fencing token of a group's owner; each promotion takes a higher one.
    Generation
}
number! {
    /// Number of a checkpoint: epoch e is the changes between checkpoints e-1 and e. 0 is "before the first".
    Epoch
}
number! {
    /// Place of a change in the one order of a group, counted from 1 within a session.
    Seq
}

/// Identity of a group, given when it is made and the same on all its hosts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GroupId(pub [u8; 16]);

impl fmt::Debug for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for GroupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl GroupId {
    /// The identity that a name stands for, so that both sides of a pair get it from the name alone.
    pub fn of_name(name: &str) -> GroupId {
        let mut id = [0; 16];
        for (half, key) in [(0usize, 0x6c69_7665_626c_6b31u64), (8, 0x7265_706c_6963_6174)] {
            let h = name.bytes().fold(key, |h, b| crate::digest::mix(h ^ u64::from(b)));
            id[half..half + 8].copy_from_slice(&crate::digest::mix(h ^ name.len() as u64).to_le_bytes());
        }
        GroupId(id)
    }
}

/// What a change does to a range of a volume, without its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Bytes follow.
    Write,
    /// Reads as zero afterwards.
    Zero,
}
