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
];
