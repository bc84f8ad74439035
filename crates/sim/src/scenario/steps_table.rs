//! The operations of which every crash point is tried (see `steps`). A new one is one more entry.

use super::nth::{Finish, Script, Step};
use super::nth_stacks::{
    BESIDE, BY_HEADER, CHAIN, CHAIN_AND_EMPTY, CHAIN_OF_FOUR, QCOW2_TO_RAW, QCOW2_TO_SMALL, RAW_TO_QCOW2,
    SMALL, TWO_AND_EMPTY, WRITTEN_BELOW,
};
use super::nth_table::{commit, job, mirror, stream};
use serde_json::{Value, json};

/// Opens an empty image without what its header names.
const ADD_NEW: Step = Step::Do("blockdev-add", || added("new"));
const ADD_NEWER: Step = Step::Do("blockdev-add", || added("newer"));

fn added(name: &str) -> Value {
    json!({"driver": "qcow2", "node-name": name, "backing": null,
        "file": {"driver": "file", "filename": format!("/{name}.img")}})
}

fn snapshot(node: &str, name: &str) -> Value {
    json!({"node-name": node, "snapshot-file": format!("/{name}.img"), "snapshot-node-name": name})
}

/// All of them. The order decides which seed is which case: add at the end.
pub(crate) const SCRIPTS: &[Script] = &[
    Script {
        name: "commit the middle",
        on: &CHAIN,
        steps: &[commit(|| json!({"top-node": "mid"}), Finish::Itself)],
    },
    Script {
        name: "commit the middle, small clusters, raw base, images in use not deleted",
        on: &SMALL,
        steps: &[commit(|| json!({"top-node": "mid", "delete-images": true}), Finish::Itself)],
    },
    Script {
        name: "commit two layers, compared, images in use not deleted",
        on: &CHAIN_OF_FOUR,
        steps: &[commit(
            || json!({"top-node": "three", "base-node": "base", "verify": "full", "delete-images": true}),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the active layer",
        on: &CHAIN,
        steps: &[commit(|| json!({"base-node": "mid"}), Finish::Complete)],
    },
    Script {
        name: "commit the active layer to the base, images in use not deleted",
        on: &CHAIN,
        steps: &[commit(|| json!({"delete-images": true}), Finish::Complete)],
    },
    Script {
        name: "commit the active layer, small clusters, by hand",
        on: &SMALL,
        steps: &[commit(|| json!({"auto-finalize": false, "auto-dismiss": false}), Finish::CompleteByHand)],
    },
    Script { name: "stream all", on: &CHAIN, steps: &[stream(|| json!({}), Finish::Itself)] },
    Script {
        name: "stream all, small clusters, raw base, images in use not deleted",
        on: &SMALL,
        steps: &[stream(|| json!({"delete-images": true}), Finish::Itself)],
    },
    Script {
        name: "stream down to the base, compared",
        on: &CHAIN,
        steps: &[stream(|| json!({"base-node": "base", "verify": "full"}), Finish::Itself)],
    },
    Script {
        name: "stream a layer below the active one, images in use not deleted",
        on: &CHAIN_OF_FOUR,
        steps: &[job(
            "block-stream",
            || json!({"job-id": "job", "device": "three", "base-node": "base", "delete-images": true}),
            Finish::Itself,
        )],
    },
    Script {
        name: "mirror raw to qcow2, pivot",
        on: &RAW_TO_QCOW2,
        steps: &[mirror(|| json!({}), Finish::Complete)],
    },
    Script {
        name: "mirror qcow2 to raw, write-blocking, compared, pivot",
        on: &QCOW2_TO_RAW,
        steps: &[mirror(|| json!({"copy-mode": "write-blocking", "verify": "full"}), Finish::Complete)],
    },
    Script {
        name: "mirror qcow2 to small clusters, by hand",
        on: &QCOW2_TO_SMALL,
        steps: &[mirror(|| json!({"auto-finalize": false, "auto-dismiss": false}), Finish::CompleteByHand)],
    },
    Script {
        name: "mirror the top layer, pivot",
        on: &BESIDE,
        steps: &[mirror(|| json!({"sync": "top"}), Finish::Complete)],
    },
    Script {
        name: "a new image on top",
        on: &CHAIN,
        steps: &[Step::Do("blockdev-snapshot-sync", || snapshot("top", "snap"))],
    },
    Script {
        name: "a layer on top",
        on: &CHAIN_AND_EMPTY,
        steps: &[ADD_NEW, Step::Do("blockdev-snapshot", || json!({"node": "mid", "overlay": "new"}))],
    },
    Script {
        name: "layers on two disks at once",
        on: &TWO_AND_EMPTY,
        steps: &[
            ADD_NEW,
            ADD_NEWER,
            Step::Do("transaction", || {
                json!({"actions": [
                    {"type": "blockdev-snapshot", "data": {"node": "disk", "overlay": "new"}},
                    {"type": "blockdev-snapshot", "data": {"node": "other", "overlay": "newer"}},
                ]})
            }),
        ],
    },
    Script {
        name: "new images on top, and down again",
        on: &RAW_TO_QCOW2,
        steps: &[
            Step::Do("blockdev-snapshot-sync", || snapshot("disk", "one")),
            Step::Do("blockdev-snapshot-sync", || snapshot("one", "two")),
            job(
                "block-commit",
                || json!({"job-id": "job", "device": "two", "top-node": "one", "delete-images": true}),
                Finish::Itself,
            ),
            job(
                "block-commit",
                || json!({"job-id": "job", "device": "two", "delete-images": true}),
                Finish::Complete,
            ),
        ],
    },
    Script {
        name: "commit the middle, which somebody writes to, images in use not deleted",
        on: &WRITTEN_BELOW,
        steps: &[commit(
            || json!({"top-node": "mid", "base-node": "base", "delete-images": true}),
            Finish::Complete,
        )],
    },
    Script {
        name: "commit the middle by header, images deleted",
        on: &BY_HEADER,
        steps: &[commit(
            || json!({"top": "/mid.img", "base": "/base.img", "delete-images": true}),
            Finish::Itself,
        )],
    },
    Script {
        name: "a new image on top, and down again, compared, image deleted",
        on: &QCOW2_TO_SMALL,
        steps: &[
            Step::Do("blockdev-snapshot-sync", || snapshot("disk", "one")),
            job(
                "block-commit",
                || json!({"job-id": "job", "device": "one", "verify": "full", "delete-images": true}),
                Finish::Complete,
            ),
        ],
    },
    Script {
        name: "stream all by header, images deleted",
        on: &BY_HEADER,
        steps: &[stream(|| json!({"delete-images": true}), Finish::Itself)],
    },
    Script {
        name: "stream down to the base by header, by hand, images deleted",
        on: &BY_HEADER,
        steps: &[stream(
            || json!({"base": "/base.img", "delete-images": true, "auto-finalize": false, "auto-dismiss": false}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "mirror to an image that is made for it, pivot",
        on: &BY_HEADER,
        steps: &[job(
            "drive-mirror",
            || json!({"job-id": "job", "device": "top", "target": "/copy.img", "format": "qcow2", "sync": "full"}),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror the top layer to an image that is made for it, compared, by hand",
        on: &BY_HEADER,
        steps: &[job(
            "drive-mirror",
            || {
                json!({"job-id": "job", "device": "top", "target": "/copy.img", "format": "qcow2", "sync": "top",
                    "node-name": "copy", "verify": "full", "auto-finalize": false, "auto-dismiss": false})
            },
            Finish::CompleteByHand,
        )],
    },
    Script {
        name: "new images on two disks at once",
        on: &TWO_AND_EMPTY,
        steps: &[Step::Do("transaction", || {
            json!({"actions": [
                {"type": "blockdev-snapshot-sync", "data": snapshot("disk", "one")},
                {"type": "blockdev-snapshot-sync", "data": snapshot("other", "two")},
            ]})
        })],
    },
];
