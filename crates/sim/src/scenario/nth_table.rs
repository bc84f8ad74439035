//! The scripts whose every I/O is failed in turn (see `nth`). A new operation is one more entry here.

use super::nth::{Finish, Layer, Script, Step};
use serde_json::{Value, json};

/// A chain of three; each layer has something that no other has, and some that the one above covers.
const CHAIN: &[Layer] = &[
    Layer { name: "base", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "mid", cluster: 4096, over: Some("base"), written: &[(30, 60), (300, 50)], open: true },
    Layer {
        name: "top",
        cluster: 4096,
        over: Some("mid"),
        written: &[(80, 30), (210, 10), (480, 33)],
        open: true,
    },
];

/// The same with tables so small that they are made and changed all the time, over a raw base.
const SMALL: &[Layer] = &[
    Layer { name: "base", cluster: 0, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "mid", cluster: 512, over: Some("base"), written: &[(30, 60), (300, 50)], open: true },
    Layer {
        name: "top",
        cluster: 512,
        over: Some("mid"),
        written: &[(80, 30), (210, 10), (480, 33)],
        open: true,
    },
];

/// Not opened: for scripts that open it.
const CLOSED: &[Layer] = &[
    Layer { name: "disk", cluster: 0, over: None, written: &[(5, 9)], open: true },
    Layer { name: "base", cluster: 4096, over: None, written: &[(0, 60)], open: false },
    Layer { name: "mid", cluster: 4096, over: Some("base"), written: &[(30, 60)], open: false },
];

/// A disk and an empty place to copy it to.
const RAW_TO_QCOW2: &[Layer] = &[
    Layer { name: "disk", cluster: 0, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "target", cluster: 4096, over: None, written: &[], open: true },
];
const QCOW2_TO_RAW: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "target", cluster: 0, over: None, written: &[(100, 30)], open: true },
];
const QCOW2_TO_SMALL: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "target", cluster: 512, over: None, written: &[(100, 30)], open: true },
];
/// A disk with a layer of its own, and a place beside that layer.
const BESIDE: &[Layer] = &[
    Layer { name: "base", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "disk", cluster: 4096, over: Some("base"), written: &[(30, 60), (300, 50)], open: true },
    Layer { name: "target", cluster: 4096, over: Some("base"), written: &[], open: true },
];

/// A disk, and an empty image that is to go on top.
const CHAIN_AND_EMPTY: &[Layer] = &[
    Layer { name: "base", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "mid", cluster: 4096, over: Some("base"), written: &[(30, 60), (300, 50)], open: true },
    Layer { name: "new", cluster: 4096, over: Some("mid"), written: &[], open: false },
];
/// Two disks, and the images that are to go on top of them.
const TWO_AND_EMPTY: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90)], open: true },
    Layer { name: "other", cluster: 0, over: None, written: &[(7, 60)], open: true },
    Layer { name: "new", cluster: 4096, over: Some("disk"), written: &[], open: false },
    Layer { name: "newer", cluster: 512, over: Some("other"), written: &[], open: false },
];
const CHAIN_OF_FOUR: &[Layer] = &[
    Layer { name: "base", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "two", cluster: 512, over: Some("base"), written: &[(30, 60), (300, 50)], open: true },
    Layer { name: "three", cluster: 4096, over: Some("two"), written: &[(50, 9), (333, 30)], open: true },
    Layer { name: "top", cluster: 65536, over: Some("three"), written: &[(80, 30), (210, 10)], open: true },
];

/// A disk, a copy of some of it, and a place for a copy of one instant.
const DISK_AND_TWO: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "target", cluster: 4096, over: None, written: &[], open: true },
    Layer { name: "kept", cluster: 0, over: None, written: &[], open: true },
];
/// A disk, a place to copy it to, and one for what clients overwrite meanwhile.
const BUFFERED: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90), (600, 40)], open: true },
    Layer { name: "target", cluster: 0, over: None, written: &[], open: true },
    Layer { name: "buffer", cluster: 4096, over: None, written: &[], open: false },
];
/// Two disks and a place for each.
const TWO_PAIRS: &[Layer] = &[
    Layer { name: "disk", cluster: 4096, over: None, written: &[(0, 60), (200, 90)], open: true },
    Layer { name: "target", cluster: 512, over: None, written: &[], open: true },
    Layer { name: "other", cluster: 0, over: None, written: &[(7, 60)], open: true },
    Layer { name: "place", cluster: 4096, over: None, written: &[], open: true },
];

fn mirror(more: Value) -> Value {
    with(
        json!({"job-id": "job", "device": "disk", "target": "target", "sync": "full", "granularity": 65536}),
        more,
    )
}

fn commit(more: Value) -> Value {
    with(json!({"job-id": "job", "device": "top"}), more)
}

fn stream(more: Value) -> Value {
    with(json!({"job-id": "job", "device": "top"}), more)
}

fn backup(more: Value) -> Value {
    with(json!({"job-id": "job", "device": "disk", "target": "target", "sync": "full"}), more)
}

fn with(mut all: Value, more: Value) -> Value {
    if let (Value::Object(all), Value::Object(more)) = (&mut all, more) {
        all.extend(more);
    }
    all
}

/// All of them. The order decides which seed is which case: add at the end.
pub(crate) const SCRIPTS: &[Script] = &[
    Script {
        name: "mirror raw to qcow2, complete",
        layers: RAW_TO_QCOW2,
        disk: "disk",
        steps: &[Step::Job("blockdev-mirror", || mirror(json!({})), Finish::Complete)],
    },
    Script {
        name: "mirror qcow2 to raw, write-blocking, complete",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"copy-mode": "write-blocking"})),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror qcow2 to small clusters, soft cancel",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job("blockdev-mirror", || mirror(json!({})), Finish::Stop)],
    },
    Script {
        name: "mirror with on-error=stop",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"on-source-error": "stop", "on-target-error": "stop"})),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror with on-error=ignore",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"on-source-error": "ignore", "on-target-error": "ignore"})),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror sync=top, soft cancel",
        layers: BESIDE,
        disk: "disk",
        steps: &[Step::Job("blockdev-mirror", || mirror(json!({"sync": "top"})), Finish::Stop)],
    },
    Script {
        name: "commit the middle",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"top-node": "mid"})), Finish::Itself)],
    },
    Script {
        name: "commit the middle, small clusters, raw base",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"top-node": "mid"})), Finish::Itself)],
    },
    Script {
        name: "commit the middle, by hand",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "mid", "auto-finalize": false, "auto-dismiss": false})),
            Finish::ByHand,
        )],
    },
    Script {
        name: "commit the middle, on-error=stop",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "mid", "on-error": "stop"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the active layer to the base",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({})), Finish::Complete)],
    },
    Script {
        name: "commit the active layer by one, small clusters",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"base-node": "mid"})), Finish::Complete)],
    },
    Script {
        name: "commit the active layer, cancelled when ready",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({})), Finish::Stop)],
    },
    Script {
        name: "stream all",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({})), Finish::Itself)],
    },
    Script {
        name: "stream all, small clusters, raw base",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({})), Finish::Itself)],
    },
    Script {
        name: "stream down to the base",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({"base-node": "base"})), Finish::Itself)],
    },
    Script {
        name: "stream with on-error=stop",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({"on-error": "stop"})), Finish::Itself)],
    },
    Script {
        name: "open a chain and close it",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/mid.img"}}),
            ),
            Step::Do("blockdev-del", || json!({"node-name": "n"})),
        ],
    },
    Script {
        name: "create a qcow2 image",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do("blockdev-add", || json!({"driver": "file", "node-name": "f", "filename": "/base.img"})),
            Step::Job(
                "blockdev-create",
                || {
                    json!({"job-id": "job", "options": {
                        "driver": "qcow2", "file": "f", "size": 1 << 20, "cluster-size": 4096}})
                },
                Finish::ByHand,
            ),
        ],
    },
    Script {
        name: "grow an image",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/base.img"}}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 64 << 20})),
            Step::Do("blockdev-del", || json!({"node-name": "n"})),
        ],
    },
    Script {
        name: "back up all to qcow2",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job("blockdev-backup", || backup(json!({})), Finish::Itself)],
    },
    Script {
        name: "back up all to raw, by hand",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-backup",
            || backup(json!({"auto-finalize": false, "auto-dismiss": false})),
            Finish::ByHand,
        )],
    },
    Script {
        name: "back up the top layer",
        layers: BESIDE,
        disk: "disk",
        steps: &[Step::Job("blockdev-backup", || backup(json!({"sync": "top"})), Finish::Itself)],
    },
    Script {
        name: "back up with on-error=stop",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-backup",
            || backup(json!({"on-source-error": "stop", "on-target-error": "stop"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "back up by a bitmap",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b"})),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"sync": "incremental", "bitmap": "b"})),
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "put a layer on top",
        layers: CHAIN_AND_EMPTY,
        disk: "mid",
        steps: &[
            Step::Do("blockdev-add", || {
                json!({"driver": "qcow2", "node-name": "new", "backing": null,
                       "file": {"driver": "file", "filename": "/new.img"}})
            }),
            Step::Do("blockdev-snapshot", || json!({"node": "mid", "overlay": "new"})),
        ],
    },
    Script {
        name: "put layers on two disks at once",
        layers: TWO_AND_EMPTY,
        disk: "disk",
        steps: &[
            Step::Do("blockdev-add", || {
                json!({"driver": "qcow2", "node-name": "new", "backing": null,
                       "file": {"driver": "file", "filename": "/new.img"}})
            }),
            Step::Do("blockdev-add", || {
                json!({"driver": "qcow2", "node-name": "newer", "backing": null,
                       "file": {"driver": "file", "filename": "/newer.img"}})
            }),
            Step::Do("transaction", || {
                json!({"actions": [
                    {"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "new"}},
                    {"type": "blockdev-snapshot", "data": {"node": "other", "overlay": "newer"}},
                ]})
            }),
        ],
    },
    Script {
        name: "commit the active layer by hand",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"base-node": "mid", "auto-finalize": false, "auto-dismiss": false})),
            Finish::CompleteByHand,
        )],
    },
    Script {
        name: "mirror by hand",
        layers: RAW_TO_QCOW2,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"auto-finalize": false, "auto-dismiss": false})),
            Finish::CompleteByHand,
        )],
    },
    Script {
        name: "stream by hand",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job(
            "block-stream",
            || stream(json!({"base-node": "base", "auto-finalize": false, "auto-dismiss": false})),
            Finish::ByHand,
        )],
    },
    Script {
        name: "stream a layer below the active one",
        layers: CHAIN_OF_FOUR,
        disk: "top",
        steps: &[Step::Job(
            "block-stream",
            || json!({"job-id": "job", "device": "three", "base-node": "base"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "mirror in read-write-blocking mode",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"copy-mode": "read-write-blocking"})),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror within a small buffer",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"granularity": 512, "buf-size": 4096})),
            Finish::Complete,
        )],
    },
    Script {
        name: "commit two layers in the middle",
        layers: CHAIN_OF_FOUR,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "three", "base-node": "base"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit with on-error=ignore",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "mid", "on-error": "ignore"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "stream with on-error=ignore",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({"on-error": "ignore"})), Finish::Itself)],
    },
    Script {
        name: "commit the active layer with on-error=stop",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"on-error": "stop"})), Finish::Complete)],
    },
    Script {
        name: "export a disk and take it back",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/mid.img"}}),
            ),
            Step::Do(
                "block-export-add",
                || json!({"type": "nbd", "id": "e1", "node-name": "n", "name": "n", "writable": true}),
            ),
            Step::Do("block-export-del", || json!({"id": "e1", "mode": "hard"})),
        ],
    },
    Script {
        name: "create a raw image, preallocated",
        layers: CLOSED,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-create",
            || {
                json!({"job-id": "job", "options": {
                    "driver": "file", "filename": "/created.img", "size": 1 << 20, "preallocation": "full"}})
            },
            Finish::ByHand,
        )],
    },
    Script {
        name: "create a preallocated qcow2 image of small clusters",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do("blockdev-add", || json!({"driver": "file", "node-name": "f", "filename": "/base.img"})),
            Step::Job(
                "blockdev-create",
                || {
                    json!({"job-id": "job", "options": {
                        "driver": "qcow2", "file": "f", "size": 1 << 18, "cluster-size": 512,
                        "preallocation": "metadata"}})
                },
                Finish::ByHand,
            ),
        ],
    },
    Script {
        name: "mirror raw to qcow2, write-blocking",
        layers: RAW_TO_QCOW2,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"copy-mode": "write-blocking"})),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror raw to qcow2, read-write-blocking, on-error=stop",
        layers: RAW_TO_QCOW2,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || {
                mirror(
                    json!({"copy-mode": "read-write-blocking", "on-source-error": "stop", "on-target-error": "enospc"}),
                )
            },
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror sync=none, soft cancel",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job("blockdev-mirror", || mirror(json!({"sync": "none"})), Finish::Stop)],
    },
    Script {
        name: "mirror sync=top, complete",
        layers: BESIDE,
        disk: "disk",
        steps: &[Step::Job("blockdev-mirror", || mirror(json!({"sync": "top"})), Finish::Complete)],
    },
    Script {
        name: "mirror sync=top, write-blocking, soft cancel",
        layers: BESIDE,
        disk: "disk",
        steps: &[Step::Job(
            "blockdev-mirror",
            || mirror(json!({"sync": "top", "copy-mode": "write-blocking"})),
            Finish::Stop,
        )],
    },
    Script {
        name: "drive-mirror to a new image",
        layers: CLOSED,
        disk: "disk",
        steps: &[Step::Job(
            "drive-mirror",
            || json!({"job-id": "job", "device": "disk", "target": "/made.img", "sync": "full", "format": "qcow2"}),
            Finish::Complete,
        )],
    },
    Script {
        name: "drive-backup to a new image",
        layers: CLOSED,
        disk: "disk",
        steps: &[Step::Job(
            "drive-backup",
            || json!({"job-id": "job", "device": "disk", "target": "/made.img", "sync": "full", "format": "qcow2"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the active layer with on-error=ignore",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"on-error": "ignore"})), Finish::Complete)],
    },
    Script {
        name: "commit the active layer of four",
        layers: CHAIN_OF_FOUR,
        disk: "top",
        steps: &[Step::Job("block-commit", || commit(json!({"base-node": "two"})), Finish::Complete)],
    },
    Script {
        name: "commit the middle, naming the backing file",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "mid", "backing-file": "base.img", "backing-mask-protocol": true})),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the second of four",
        layers: CHAIN_OF_FOUR,
        disk: "top",
        steps: &[Step::Job(
            "block-commit",
            || commit(json!({"top-node": "two", "on-error": "stop"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "stream above a bottom",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job("block-stream", || stream(json!({"bottom": "mid"})), Finish::Itself)],
    },
    Script {
        name: "stream, naming the backing file",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Job(
            "block-stream",
            || stream(json!({"base-node": "base", "backing-file": "base.img"})),
            Finish::Itself,
        )],
    },
    Script {
        name: "stream all below the active one",
        layers: CHAIN_OF_FOUR,
        disk: "top",
        steps: &[Step::Job("block-stream", || json!({"job-id": "job", "device": "three"}), Finish::Itself)],
    },
    Script {
        name: "stream the middle of the chain over raw",
        layers: SMALL,
        disk: "top",
        steps: &[Step::Job(
            "block-stream",
            || json!({"job-id": "job", "device": "mid", "on-error": "stop"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "back up what is about to change, until cancelled",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job("blockdev-backup", || backup(json!({"sync": "none"})), Finish::Cancel)],
    },
    Script {
        name: "back up compressed",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[Step::Job("blockdev-backup", || backup(json!({"compress": true})), Finish::Itself)],
    },
    Script {
        name: "back up all, whatever becomes of it clears the bitmap",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b"})),
            Step::Rewrite(210, 20),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"bitmap": "b", "bitmap-mode": "always"})),
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "back up by a persistent bitmap",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b", "persistent": true})),
            Step::Rewrite(20, 70),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"sync": "incremental", "bitmap": "b"})),
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "back up by a persistent bitmap, keeping what failed",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b", "persistent": true})),
            Step::Rewrite(20, 70),
            Step::Job(
                "blockdev-backup",
                || {
                    backup(
                        json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": "always", "on-target-error": "stop"}),
                    )
                },
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "store a persistent bitmap, load it and back up by it",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b", "persistent": true})),
            Step::Rewrite(200, 30),
            Step::Do("block-dirty-bitmap-disable", || json!({"node": "disk", "name": "b"})),
            Step::Do("block-dirty-bitmap-enable", || json!({"node": "disk", "name": "b"})),
            Step::Do(
                "blockdev-reopen",
                || json!({"options": [{"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null, "discard": "unmap"}]}),
            ),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"sync": "incremental", "bitmap": "b"})),
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "a transaction clears a bitmap and starts a backup",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[
            Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b"})),
            Step::Rewrite(20, 5),
            Step::Job(
                "transaction",
                || {
                    json!({"actions": [
                        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "b"}},
                        {"type": "blockdev-backup", "data": backup(json!({}))},
                    ]})
                },
                Finish::Itself,
            ),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"})),
        ],
    },
    Script {
        name: "two backups end together or not at all",
        layers: TWO_PAIRS,
        disk: "disk",
        steps: &[Step::Job(
            "transaction",
            || {
                json!({"properties": {"completion-mode": "grouped"}, "actions": [
                    {"type": "blockdev-backup", "data": backup(json!({}))},
                    {"type": "blockdev-backup", "data": backup(json!({"job-id": "second", "device": "other", "target": "place"}))},
                ]})
            },
            Finish::Itself,
        )],
    },
    Script {
        name: "a transaction puts made layers on two disks",
        layers: TWO_PAIRS,
        disk: "disk",
        steps: &[Step::Do("transaction", || {
            json!({"actions": [
                {"type": "blockdev-snapshot-sync", "data": {"node-name": "disk", "snapshot-file": "/s1.img", "snapshot-node-name": "s1"}},
                {"type": "blockdev-snapshot-sync", "data": {"node-name": "other", "snapshot-file": "/s2.img", "snapshot-node-name": "s2"}},
                {"type": "block-dirty-bitmap-add", "data": {"node": "place", "name": "b", "persistent": true}},
            ]})
        })],
    },
    Script {
        name: "put a layer on top that the command makes",
        layers: CHAIN_AND_EMPTY,
        disk: "mid",
        steps: &[Step::Do(
            "blockdev-snapshot-sync",
            || json!({"node-name": "mid", "snapshot-file": "/s.img", "snapshot-node-name": "s", "format": "qcow2"}),
        )],
    },
    Script {
        name: "take an internal snapshot, write, delete it",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[
            Step::Do("blockdev-snapshot-internal-sync", || json!({"device": "disk", "name": "s"})),
            Step::Rewrite(30, 50),
            Step::Do("blockdev-snapshot-delete-internal-sync", || json!({"device": "disk", "name": "s"})),
        ],
    },
    Script {
        name: "a transaction takes two internal snapshots",
        layers: TWO_AND_EMPTY,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "new", "file": {"driver": "file", "filename": "/newer.img"}}),
            ),
            Step::Do("transaction", || {
                json!({"actions": [
                    {"type": "blockdev-snapshot-internal-sync", "data": {"device": "disk", "name": "s"}},
                    {"type": "blockdev-snapshot-internal-sync", "data": {"device": "new", "name": "s"}},
                ]})
            }),
        ],
    },
    Script {
        name: "change the backing file's name",
        layers: CHAIN,
        disk: "top",
        steps: &[Step::Do(
            "change-backing-file",
            || json!({"device": "top", "image-node-name": "mid", "backing-file": "/base.img"}),
        )],
    },
    Script {
        name: "reopen an image read-only and back",
        layers: CHAIN,
        disk: "top",
        steps: &[
            Step::Do(
                "blockdev-reopen",
                || json!({"options": [{"driver": "qcow2", "node-name": "mid", "file": "mid-file", "backing": "base", "read-only": true}]}),
            ),
            Step::Do(
                "blockdev-reopen",
                || json!({"options": [{"driver": "qcow2", "node-name": "mid", "file": "mid-file", "backing": "base", "read-only": false}]}),
            ),
        ],
    },
    Script {
        name: "reopen the active image and its file with discard",
        layers: SMALL,
        disk: "top",
        steps: &[
            Step::Rewrite(85, 9),
            Step::Do(
                "blockdev-reopen",
                || json!({"options": [{"driver": "qcow2", "node-name": "top", "file": "top-file", "backing": "mid", "discard": "unmap"}, {"driver": "file", "node-name": "top-file", "filename": "/top.img", "discard": "unmap"}]}),
            ),
            Step::Rewrite(85, 9),
        ],
    },
    Script {
        name: "amend an image",
        layers: QCOW2_TO_RAW,
        disk: "disk",
        steps: &[Step::Job(
            "x-blockdev-amend",
            || json!({"job-id": "job", "node-name": "disk", "options": {"driver": "qcow2"}}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "shrink an image",
        layers: CLOSED,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/base.img"}}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 12 << 10})),
            Step::Do("blockdev-del", || json!({"node-name": "n"})),
        ],
    },
    Script {
        name: "grow a raw image and a qcow2 image of small clusters",
        layers: TWO_AND_EMPTY,
        disk: "disk",
        steps: &[
            Step::Do("block_resize", || json!({"node-name": "other", "size": 1 << 20})),
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/newer.img"}, "backing": null}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 64 << 20})),
            Step::Do("blockdev-del", || json!({"node-name": "n"})),
        ],
    },
    Script {
        name: "read one instant through copy-before-write",
        layers: DISK_AND_TWO,
        disk: "disk",
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target"}),
            ),
            Step::Do(
                "blockdev-add",
                || json!({"driver": "snapshot-access", "node-name": "instant", "file": "cbw"}),
            ),
            Step::Job(
                "blockdev-backup",
                || json!({"job-id": "job", "device": "instant", "target": "kept", "sync": "full"}),
                Finish::Itself,
            ),
            Step::Do("blockdev-del", || json!({"node-name": "instant"})),
            Step::Do("blockdev-del", || json!({"node-name": "cbw"})),
        ],
    },
    Script {
        name: "back up while the guest writes",
        layers: QCOW2_TO_SMALL,
        disk: "disk",
        steps: &[
            Step::Rewrite(0, 5),
            Step::Rewrite(600, 30),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"x-perf": {"max-chunk": 65536, "max-workers": 2}})),
                Finish::Itself,
            ),
            Step::Rewrite(300, 10),
        ],
    },
    Script {
        name: "back up through a buffer",
        layers: BUFFERED,
        disk: "disk",
        steps: &[
            Step::Do("blockdev-add", || {
                json!({"driver": "qcow2", "node-name": "buffer", "discard": "unmap",
                       "file": {"driver": "file", "filename": "/buffer.img", "discard": "unmap"}})
            }),
            Step::Job(
                "blockdev-backup",
                || backup(json!({"buffer": "buffer", "buffer-size": 65536})),
                Finish::Itself,
            ),
            Step::Rewrite(205, 40),
        ],
    },
];
