//! The images that scripts find (see `nth`, `steps`).

use super::nth::{Layer, Stack};

/// What the lowest image of most has.
const SPREAD: &[(u64, u64)] = &[(0, 60), (200, 90), (600, 40)];

const fn raw(name: &'static str, written: &'static [(u64, u64)]) -> Layer {
    Layer { name, cluster: 0, over: None, written, open: true }
}

const fn qcow2(
    name: &'static str,
    cluster: u64,
    over: Option<&'static str>,
    written: &'static [(u64, u64)],
) -> Layer {
    Layer { name, cluster, over, written, open: true }
}

/// Not opened before the script begins.
const fn closed(layer: Layer) -> Layer {
    Layer { open: false, ..layer }
}

/// A chain of three; each layer has something that no other has, and some that the one above covers.
pub(super) const CHAIN: Stack = Stack {
    disk: "top",
    layers: &[
        qcow2("base", 4096, None, SPREAD),
        qcow2("mid", 4096, Some("base"), &[(30, 60), (300, 50)]),
        qcow2("top", 4096, Some("mid"), &[(80, 30), (210, 10), (480, 33)]),
    ],
};

/// The guest writes to the middle one; what is over it shows the same.
pub(super) const WRITTEN_BELOW: Stack = Stack {
    disk: "mid",
    layers: &[
        qcow2("base", 4096, None, SPREAD),
        qcow2("mid", 4096, Some("base"), &[(30, 60), (300, 50)]),
        qcow2("top", 4096, Some("mid"), &[]),
    ],
};

/// [`CHAIN`] with tables so small that they are made and changed all the time, over a raw base.
pub(super) const SMALL: Stack = Stack {
    disk: "top",
    layers: &[
        raw("base", SPREAD),
        qcow2("mid", 512, Some("base"), &[(30, 60), (300, 50)]),
        qcow2("top", 512, Some("mid"), &[(80, 30), (210, 10), (480, 33)]),
    ],
};

/// Not opened: for scripts that open it.
pub(super) const CLOSED: Stack = Stack {
    disk: "disk",
    layers: &[
        raw("disk", &[(5, 9)]),
        closed(qcow2("base", 4096, None, &[(0, 60)])),
        closed(qcow2("mid", 4096, Some("base"), &[(30, 60)])),
    ],
};

/// A disk and an empty place to copy it to.
pub(super) const RAW_TO_QCOW2: Stack =
    Stack { disk: "disk", layers: &[raw("disk", SPREAD), qcow2("target", 4096, None, &[])] };
pub(super) const QCOW2_TO_RAW: Stack =
    Stack { disk: "disk", layers: &[qcow2("disk", 4096, None, SPREAD), raw("target", &[(100, 30)])] };
pub(super) const QCOW2_TO_SMALL: Stack = Stack {
    disk: "disk",
    layers: &[qcow2("disk", 4096, None, SPREAD), qcow2("target", 512, None, &[(100, 30)])],
};
/// A disk with a layer of its own, and a place beside that layer.
pub(super) const BESIDE: Stack = Stack {
    disk: "disk",
    layers: &[
        qcow2("base", 4096, None, SPREAD),
        qcow2("disk", 4096, Some("base"), &[(30, 60), (300, 50)]),
        qcow2("target", 4096, Some("base"), &[]),
    ],
};

/// A disk, and an empty image that is to go on top.
pub(super) const CHAIN_AND_EMPTY: Stack = Stack {
    disk: "mid",
    layers: &[
        qcow2("base", 4096, None, SPREAD),
        qcow2("mid", 4096, Some("base"), &[(30, 60), (300, 50)]),
        closed(qcow2("new", 4096, Some("mid"), &[])),
    ],
};
/// Two disks, and the images that are to go on top of them.
pub(super) const TWO_AND_EMPTY: Stack = Stack {
    disk: "disk",
    layers: &[
        qcow2("disk", 4096, None, &[(0, 60), (200, 90)]),
        raw("other", &[(7, 60)]),
        closed(qcow2("new", 4096, Some("disk"), &[])),
        closed(qcow2("newer", 512, Some("other"), &[])),
    ],
};
pub(super) const CHAIN_OF_FOUR: Stack = Stack {
    disk: "top",
    layers: &[
        qcow2("base", 4096, None, SPREAD),
        qcow2("two", 512, Some("base"), &[(30, 60), (300, 50)]),
        qcow2("three", 4096, Some("two"), &[(50, 9), (333, 30)]),
        qcow2("top", 65536, Some("three"), &[(80, 30), (210, 10)]),
    ],
};

/// A disk, a copy of some of it, and a place for a copy of one instant.
pub(super) const DISK_AND_TWO: Stack = Stack {
    disk: "disk",
    layers: &[qcow2("disk", 4096, None, SPREAD), qcow2("target", 4096, None, &[]), raw("kept", &[])],
};
/// A disk, a place to copy it to, and one for what clients overwrite meanwhile.
pub(super) const BUFFERED: Stack = Stack {
    disk: "disk",
    layers: &[
        qcow2("disk", 4096, None, SPREAD),
        raw("target", &[]),
        closed(qcow2("buffer", 4096, None, &[])),
    ],
};
/// Two disks and a place for each.
pub(super) const TWO_PAIRS: Stack = Stack {
    disk: "disk",
    layers: &[
        qcow2("disk", 4096, None, &[(0, 60), (200, 90)]),
        qcow2("target", 512, None, &[]),
        raw("other", &[(7, 60)]),
        qcow2("place", 4096, None, &[]),
    ],
};

/// A chain whose layers below the disk are opened as its header names them, so that they go when they have left the chain.
pub(super) const BY_HEADER: Stack = Stack {
    disk: "top",
    layers: &[
        closed(qcow2("base", 4096, None, SPREAD)),
        closed(qcow2("mid", 512, Some("base"), &[(30, 60), (300, 50)])),
        qcow2("top", 4096, Some("mid"), &[(80, 30), (210, 10), (480, 33)]),
    ],
};
/// A disk and two places of the same length.
pub(super) const DISK_AND_TWO_RAW: Stack = Stack {
    disk: "disk",
    layers: &[qcow2("disk", 4096, None, SPREAD), raw("first", &[(100, 30)]), raw("second", &[(100, 30)])],
};
