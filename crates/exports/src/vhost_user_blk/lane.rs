//! The two kinds of ring behind one face: where requests are taken from and answered, whether the other side is to be told.
//!
//! What must stay true: a request is in the log, if there is one, before it begins and until its answer can be seen.

use super::chain::{self, Chain};
use super::inflight::InflightLog;
use super::packed::Packed;
use super::split::Split;
use block::Result;
use env::os::shared::{GuestMemory, Piece};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::rc::Rc;

/// Where a ring lies: guest addresses and size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Layout {
    pub(super) size: u16,
    pub(super) descriptors: u64,
    /// The available ring; of a packed ring where the driver says when it wants to be told.
    pub(super) available: u64,
    /// The used ring; of a packed ring where we say when we want to be told.
    pub(super) used: u64,
}

/// A descriptor of a packed ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Descriptor {
    pub(super) at: u64,
    pub(super) len: u32,
    pub(super) id: u16,
    pub(super) flags: u16,
}

/// Descriptors of one request.
pub(super) type List = SmallVec<[Descriptor; 4]>;

/// What is needed to answer a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Token {
    /// Its first descriptor; in a packed ring the number that the guest gave it.
    pub(super) head: u16,
    /// Descriptors that it takes up in a packed ring.
    pub(super) count: u16,
    /// Its place in the log of a packed ring.
    pub(super) slot: u16,
}

/// A request that was found, and not begun yet.
#[derive(Debug, Default)]
pub(super) struct Opened {
    pub(super) token: Token,
    /// What a packed ring says of it.
    pub(super) list: List,
    /// A daemon before us noted it in a packed ring's log.
    pub(super) logged: bool,
}

/// What a ring starts with.
pub(super) struct Basis {
    pub(super) layout: Layout,
    /// Where the guest and we are, as messages say it.
    pub(super) base: u32,
    pub(super) event_idx: bool,
    pub(super) log: Option<Rc<InflightLog>>,
    /// The queue's number.
    pub(super) index: u16,
}

/// A ring of one of the two kinds.
pub(super) enum Lane {
    Split(Split),
    Packed(Packed),
}

impl Lane {
    /// A ring, and the requests that a daemon before us left open, oldest first.
    pub(super) fn start(
        memory: &GuestMemory,
        packed: bool,
        basis: Basis,
    ) -> Result<(Lane, VecDeque<Opened>)> {
        if packed {
            let (ring, open) = Packed::start(memory, basis)?;
            Ok((Lane::Packed(ring), open))
        } else {
            let (ring, open) = Split::start(memory, basis)?;
            Ok((Lane::Split(ring), open))
        }
    }

    /// From now on it lies there.
    pub(super) fn remap(&mut self, memory: &GuestMemory, at: Layout) -> Result<()> {
        match self {
            Lane::Split(r) => r.remap(memory, at),
            Lane::Packed(r) => r.remap(memory, at),
        }
    }

    /// Where the guest and we are, as messages say it.
    pub(super) fn base(&self) -> u32 {
        match self {
            Lane::Split(r) => r.base(),
            Lane::Packed(r) => r.base(),
        }
    }

    /// The next request, if there is one. The error is what the guest did wrong.
    pub(super) fn take(&mut self, memory: &GuestMemory) -> Result<Option<Opened>, &'static str> {
        match self {
            Lane::Split(r) => r.take(memory),
            Lane::Packed(r) => r.take(memory),
        }
    }

    /// Notes that a request begins, and gives its buffers.
    pub(super) fn begin(
        &mut self,
        memory: &GuestMemory,
        opened: &Opened,
    ) -> Result<(Token, Chain), &'static str> {
        match self {
            Lane::Split(r) => r.begin(memory, opened.token),
            Lane::Packed(r) => {
                let chain = chain::of_list(memory, &opened.list);
                Ok((r.begin(opened)?, chain?))
            }
        }
    }

    /// Answers a request; `None` if that cannot be written.
    #[must_use]
    pub(super) fn answer(&mut self, memory: &GuestMemory, token: Token, written: u32) -> Option<()> {
        match self {
            Lane::Split(r) => r.answer(memory, token.head, written),
            Lane::Packed(r) => r.answer(memory, token, written),
        }
    }

    /// Whether the guest wants to be told of the answers since it was asked last.
    pub(super) fn wants_call(&mut self, memory: &GuestMemory) -> bool {
        match self {
            Lane::Split(r) => r.wants_call(memory),
            Lane::Packed(r) => r.wants_call(memory),
        }
    }

    /// Asks for the bell; whether there is something already. `None` if that cannot be written.
    pub(super) fn ask_for_bell(&mut self, memory: &GuestMemory) -> Option<bool> {
        match self {
            Lane::Split(r) => r.ask_for_bell(memory),
            Lane::Packed(r) => r.ask_for_bell(memory),
        }
    }

    /// The guest need not ring.
    pub(super) fn no_bell(&mut self, memory: &GuestMemory) {
        match self {
            Lane::Split(r) => r.no_bell(memory),
            Lane::Packed(r) => r.no_bell(memory),
        }
    }

    /// Whether the memory of the log was taken away.
    pub(super) fn log_is_broken(&self) -> bool {
        match self {
            Lane::Split(r) => r.log_is_broken(),
            Lane::Packed(r) => r.log_is_broken(),
        }
    }

    /// What of the guest's memory is written when requests are answered, if the front end says that the used ring
    /// counts as being at `used`.
    pub(super) fn written(&self, used: u64) -> SmallVec<[Piece; 2]> {
        match self {
            Lane::Split(r) => SmallVec::from_iter([r.written(used)]),
            Lane::Packed(r) => SmallVec::from_iter(r.written()),
        }
    }
}
