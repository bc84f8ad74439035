//! Permissions: what a parent does with a child and what it lets others do. Pure; tested with tables.
//!
//! Each edge carries two sets: what its parent needs (`needs`), and what it tolerates others doing (`shares`). A node is
//! consistent when no edge needs what another edge onto the same node does not share.

use std::fmt;

/// A set out of the four permissions (QMP: BlockPermission).
#[derive(Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Perms(u8);

impl Perms {
    /// No permission.
    pub const NONE: Perms = Perms(0);
    /// Reads give data that is consistent (not an intermediate state of a job).
    pub const CONSISTENT_READ: Perms = Perms(1);
    /// Writes that change what is read.
    pub const WRITE: Perms = Perms(2);
    /// Writes that leave what is read as it is (streaming, allocating).
    pub const WRITE_UNCHANGED: Perms = Perms(4);
    /// Changing the length.
    pub const RESIZE: Perms = Perms(8);
    /// All four.
    pub const ALL: Perms = Perms(15);

    /// Both sets together.
    #[must_use]
    pub const fn with(self, other: Perms) -> Perms {
        Perms(self.0 | other.0)
    }

    /// This set less the other.
    #[must_use]
    pub const fn without(self, other: Perms) -> Perms {
        Perms(self.0 & !other.0)
    }

    /// What both have.
    #[must_use]
    pub const fn common(self, other: Perms) -> Perms {
        Perms(self.0 & other.0)
    }

    /// Whether all of `other` is in this set.
    pub const fn has(self, other: Perms) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether the set is empty.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The QMP names, in QSD's order for messages (consistent read, write, write unchanged, resize).
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        const NAMES: [(Perms, &str); 4] = [
            (Perms::CONSISTENT_READ, "consistent-read"),
            (Perms::WRITE, "write"),
            (Perms::WRITE_UNCHANGED, "write-unchanged"),
            (Perms::RESIZE, "resize"),
        ];
        NAMES.into_iter().filter(move |(p, _)| self.has(*p)).map(|(_, n)| n)
    }
}

impl fmt::Debug for Perms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.names()).finish()
    }
}

/// What an edge asks of its child, and what it lets other parents of that child do.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Demand {
    /// What the parent does.
    pub needs: Perms,
    /// What others may do.
    pub shares: Perms,
}

impl Demand {
    /// Needs nothing and lets others do anything.
    pub const NOTHING: Demand = Demand { needs: Perms::NONE, shares: Perms::ALL };

    /// What is left of it while the parent is inactive: it may read, and lets others do anything.
    #[must_use]
    pub const fn inactive(self) -> Demand {
        Demand { needs: self.needs.common(Perms::CONSISTENT_READ), shares: Perms::ALL }
    }

    /// Two demands on one node, taken together: needs add up, shares shrink.
    #[must_use]
    pub const fn and(self, other: Demand) -> Demand {
        Demand { needs: self.needs.with(other.needs), shares: self.shares.common(other.shares) }
    }
}
