//! The scripts whose every I/O is failed in turn (see `nth`). A new operation is one more entry here.

use super::nth::{Finish, Script, Step};
use super::nth_stacks::{
    BESIDE, BUFFERED, CHAIN, CHAIN_AND_EMPTY, CHAIN_OF_FOUR, CLOSED, DISK_AND_TWO, QCOW2_TO_RAW,
    QCOW2_TO_SMALL, RAW_TO_QCOW2, SMALL, TWO_AND_EMPTY, TWO_PAIRS,
};
use serde_json::{Value, json};

/// A job on the usual nodes, with what a script adds to its arguments.
pub(super) const fn mirror(more: fn() -> Value, finish: Finish) -> Step {
    let usual = || json!({"job-id": "job", "device": "disk", "target": "target", "sync": "full", "granularity": 65536});
    Step::Job("blockdev-mirror", usual, more, finish)
}

pub(super) const fn commit(more: fn() -> Value, finish: Finish) -> Step {
    Step::Job("block-commit", || json!({"job-id": "job", "device": "top"}), more, finish)
}

pub(super) const fn stream(more: fn() -> Value, finish: Finish) -> Step {
    Step::Job("block-stream", || json!({"job-id": "job", "device": "top"}), more, finish)
}

fn usual_backup() -> Value {
    json!({"job-id": "job", "device": "disk", "target": "target", "sync": "full"})
}

pub(super) const fn backup(more: fn() -> Value, finish: Finish) -> Step {
    Step::Job("blockdev-backup", usual_backup, more, finish)
}

pub(super) const fn job(command: &'static str, arguments: fn() -> Value, finish: Finish) -> Step {
    Step::Job(command, || json!({}), arguments, finish)
}

const ADD_BITMAP: Step = Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b"}));
const ADD_PERSISTENT_BITMAP: Step =
    Step::Do("block-dirty-bitmap-add", || json!({"node": "disk", "name": "b", "persistent": true}));
const REMOVE_BITMAP: Step = Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "b"}));
const CLOSE_N: Step = Step::Do("blockdev-del", || json!({"node-name": "n"}));

/// All of them. The order decides which seed is which case: add at the end.
pub(crate) const SCRIPTS: &[Script] = &[
    Script {
        name: "mirror raw to qcow2, complete",
        on: &RAW_TO_QCOW2,
        steps: &[mirror(|| json!({}), Finish::Complete)],
    },
    Script {
        name: "mirror qcow2 to raw, write-blocking, complete",
        on: &QCOW2_TO_RAW,
        steps: &[mirror(|| json!({"copy-mode": "write-blocking"}), Finish::Complete)],
    },
    Script {
        name: "mirror qcow2 to small clusters, soft cancel",
        on: &QCOW2_TO_SMALL,
        steps: &[mirror(|| json!({}), Finish::Stop)],
    },
    Script {
        name: "mirror with on-error=stop",
        on: &QCOW2_TO_SMALL,
        steps: &[mirror(|| json!({"on-source-error": "stop", "on-target-error": "stop"}), Finish::Complete)],
    },
    Script {
        name: "mirror with on-error=ignore",
        on: &QCOW2_TO_RAW,
        steps: &[mirror(
            || json!({"on-source-error": "ignore", "on-target-error": "ignore"}),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror sync=top, soft cancel",
        on: &BESIDE,
        steps: &[mirror(|| json!({"sync": "top"}), Finish::Stop)],
    },
    Script {
        name: "commit the middle",
        on: &CHAIN,
        steps: &[commit(|| json!({"top-node": "mid"}), Finish::Itself)],
    },
    Script {
        name: "commit the middle, small clusters, raw base",
        on: &SMALL,
        steps: &[commit(|| json!({"top-node": "mid"}), Finish::Itself)],
    },
    Script {
        name: "commit the middle, by hand",
        on: &CHAIN,
        steps: &[commit(
            || json!({"top-node": "mid", "auto-finalize": false, "auto-dismiss": false}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "commit the middle, on-error=stop",
        on: &CHAIN,
        steps: &[commit(|| json!({"top-node": "mid", "on-error": "stop"}), Finish::Itself)],
    },
    Script {
        name: "commit the active layer to the base",
        on: &CHAIN,
        steps: &[commit(|| json!({}), Finish::Complete)],
    },
    Script {
        name: "commit the active layer by one, small clusters",
        on: &SMALL,
        steps: &[commit(|| json!({"base-node": "mid"}), Finish::Complete)],
    },
    Script {
        name: "commit the active layer, cancelled when ready",
        on: &CHAIN,
        steps: &[commit(|| json!({}), Finish::Stop)],
    },
    Script { name: "stream all", on: &CHAIN, steps: &[stream(|| json!({}), Finish::Itself)] },
    Script {
        name: "stream all, small clusters, raw base",
        on: &SMALL,
        steps: &[stream(|| json!({}), Finish::Itself)],
    },
    Script {
        name: "stream down to the base",
        on: &CHAIN,
        steps: &[stream(|| json!({"base-node": "base"}), Finish::Itself)],
    },
    Script {
        name: "stream with on-error=stop",
        on: &CHAIN,
        steps: &[stream(|| json!({"on-error": "stop"}), Finish::Itself)],
    },
    Script {
        name: "open a chain and close it",
        on: &CLOSED,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/mid.img"}}),
            ),
            CLOSE_N,
        ],
    },
    Script {
        name: "create a qcow2 image",
        on: &CLOSED,
        steps: &[
            Step::Do("blockdev-add", || json!({"driver": "file", "node-name": "f", "filename": "/base.img"})),
            job(
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
        on: &CLOSED,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/base.img"}}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 64 << 20})),
            CLOSE_N,
        ],
    },
    Script {
        name: "back up all to qcow2",
        on: &QCOW2_TO_SMALL,
        steps: &[backup(|| json!({}), Finish::Itself)],
    },
    Script {
        name: "back up all to raw, by hand",
        on: &QCOW2_TO_RAW,
        steps: &[backup(|| json!({"auto-finalize": false, "auto-dismiss": false}), Finish::ByHand)],
    },
    Script {
        name: "back up the top layer",
        on: &BESIDE,
        steps: &[backup(|| json!({"sync": "top"}), Finish::Itself)],
    },
    Script {
        name: "back up with on-error=stop",
        on: &QCOW2_TO_SMALL,
        steps: &[backup(|| json!({"on-source-error": "stop", "on-target-error": "stop"}), Finish::Itself)],
    },
    Script {
        name: "back up by a bitmap",
        on: &QCOW2_TO_RAW,
        steps: &[
            ADD_BITMAP,
            backup(|| json!({"sync": "incremental", "bitmap": "b"}), Finish::Itself),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "put a layer on top",
        on: &CHAIN_AND_EMPTY,
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
        on: &TWO_AND_EMPTY,
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
        on: &CHAIN,
        steps: &[commit(
            || json!({"base-node": "mid", "auto-finalize": false, "auto-dismiss": false}),
            Finish::CompleteByHand,
        )],
    },
    Script {
        name: "mirror by hand",
        on: &RAW_TO_QCOW2,
        steps: &[mirror(|| json!({"auto-finalize": false, "auto-dismiss": false}), Finish::CompleteByHand)],
    },
    Script {
        name: "stream by hand",
        on: &SMALL,
        steps: &[stream(
            || json!({"base-node": "base", "auto-finalize": false, "auto-dismiss": false}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "stream a layer below the active one",
        on: &CHAIN_OF_FOUR,
        steps: &[job(
            "block-stream",
            || json!({"job-id": "job", "device": "three", "base-node": "base"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "mirror in read-write-blocking mode",
        on: &QCOW2_TO_SMALL,
        steps: &[mirror(|| json!({"copy-mode": "read-write-blocking"}), Finish::Complete)],
    },
    Script {
        name: "mirror within a small buffer",
        on: &QCOW2_TO_RAW,
        steps: &[mirror(|| json!({"granularity": 512, "buf-size": 4096}), Finish::Complete)],
    },
    Script {
        name: "commit two layers in the middle",
        on: &CHAIN_OF_FOUR,
        steps: &[commit(|| json!({"top-node": "three", "base-node": "base"}), Finish::Itself)],
    },
    Script {
        name: "commit with on-error=ignore",
        on: &SMALL,
        steps: &[commit(|| json!({"top-node": "mid", "on-error": "ignore"}), Finish::Itself)],
    },
    Script {
        name: "stream with on-error=ignore",
        on: &SMALL,
        steps: &[stream(|| json!({"on-error": "ignore"}), Finish::Itself)],
    },
    Script {
        name: "commit the active layer with on-error=stop",
        on: &CHAIN,
        steps: &[commit(|| json!({"on-error": "stop"}), Finish::Complete)],
    },
    Script {
        name: "export a disk and take it back",
        on: &CLOSED,
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
        on: &CLOSED,
        steps: &[job(
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
        on: &CLOSED,
        steps: &[
            Step::Do("blockdev-add", || json!({"driver": "file", "node-name": "f", "filename": "/base.img"})),
            job(
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
        on: &RAW_TO_QCOW2,
        steps: &[mirror(|| json!({"copy-mode": "write-blocking"}), Finish::Complete)],
    },
    Script {
        name: "mirror raw to qcow2, read-write-blocking, on-error=stop",
        on: &RAW_TO_QCOW2,
        steps: &[mirror(
            || json!({"copy-mode": "read-write-blocking", "on-source-error": "stop", "on-target-error": "enospc"}),
            Finish::Complete,
        )],
    },
    Script {
        name: "mirror sync=none, soft cancel",
        on: &QCOW2_TO_SMALL,
        steps: &[mirror(|| json!({"sync": "none"}), Finish::Stop)],
    },
    Script {
        name: "mirror sync=top, complete",
        on: &BESIDE,
        steps: &[mirror(|| json!({"sync": "top"}), Finish::Complete)],
    },
    Script {
        name: "mirror sync=top, write-blocking, soft cancel",
        on: &BESIDE,
        steps: &[mirror(|| json!({"sync": "top", "copy-mode": "write-blocking"}), Finish::Stop)],
    },
    Script {
        name: "drive-mirror to a new image",
        on: &CLOSED,
        steps: &[job(
            "drive-mirror",
            || json!({"job-id": "job", "device": "disk", "target": "/made.img", "sync": "full", "format": "qcow2"}),
            Finish::Complete,
        )],
    },
    Script {
        name: "drive-backup to a new image",
        on: &CLOSED,
        steps: &[job(
            "drive-backup",
            || json!({"job-id": "job", "device": "disk", "target": "/made.img", "sync": "full", "format": "qcow2"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the active layer with on-error=ignore",
        on: &SMALL,
        steps: &[commit(|| json!({"on-error": "ignore"}), Finish::Complete)],
    },
    Script {
        name: "commit the active layer of four",
        on: &CHAIN_OF_FOUR,
        steps: &[commit(|| json!({"base-node": "two"}), Finish::Complete)],
    },
    Script {
        name: "commit the middle, naming the backing file",
        on: &CHAIN,
        steps: &[commit(
            || json!({"top-node": "mid", "backing-file": "base.img", "backing-mask-protocol": true}),
            Finish::Itself,
        )],
    },
    Script {
        name: "commit the second of four",
        on: &CHAIN_OF_FOUR,
        steps: &[commit(|| json!({"top-node": "two", "on-error": "stop"}), Finish::Itself)],
    },
    Script {
        name: "stream above a bottom",
        on: &CHAIN,
        steps: &[stream(|| json!({"bottom": "mid"}), Finish::Itself)],
    },
    Script {
        name: "stream, naming the backing file",
        on: &CHAIN,
        steps: &[stream(|| json!({"base-node": "base", "backing-file": "base.img"}), Finish::Itself)],
    },
    Script {
        name: "stream all below the active one",
        on: &CHAIN_OF_FOUR,
        steps: &[job("block-stream", || json!({"job-id": "job", "device": "three"}), Finish::Itself)],
    },
    Script {
        name: "stream the middle of the chain over raw",
        on: &SMALL,
        steps: &[job(
            "block-stream",
            || json!({"job-id": "job", "device": "mid", "on-error": "stop"}),
            Finish::Itself,
        )],
    },
    Script {
        name: "back up what is about to change, until cancelled",
        on: &QCOW2_TO_SMALL,
        steps: &[backup(|| json!({"sync": "none"}), Finish::Cancel)],
    },
    Script {
        name: "back up compressed",
        on: &QCOW2_TO_SMALL,
        steps: &[backup(|| json!({"compress": true}), Finish::Itself)],
    },
    Script {
        name: "back up all, whatever becomes of it clears the bitmap",
        on: &QCOW2_TO_RAW,
        steps: &[
            ADD_BITMAP,
            Step::Rewrite(210, 20),
            backup(|| json!({"bitmap": "b", "bitmap-mode": "always"}), Finish::Itself),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "back up by a persistent bitmap",
        on: &QCOW2_TO_RAW,
        steps: &[
            ADD_PERSISTENT_BITMAP,
            Step::Rewrite(20, 70),
            backup(|| json!({"sync": "incremental", "bitmap": "b"}), Finish::Itself),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "back up by a persistent bitmap, keeping what failed",
        on: &QCOW2_TO_SMALL,
        steps: &[
            ADD_PERSISTENT_BITMAP,
            Step::Rewrite(20, 70),
            backup(
                || json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": "always", "on-target-error": "stop"}),
                Finish::Itself,
            ),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "store a persistent bitmap, load it and back up by it",
        on: &QCOW2_TO_RAW,
        steps: &[
            ADD_PERSISTENT_BITMAP,
            Step::Rewrite(200, 30),
            Step::Do("block-dirty-bitmap-disable", || json!({"node": "disk", "name": "b"})),
            Step::Do("block-dirty-bitmap-enable", || json!({"node": "disk", "name": "b"})),
            Step::Do(
                "blockdev-reopen",
                || json!({"options": [{"driver": "qcow2", "node-name": "disk", "file": "disk-file", "backing": null, "discard": "unmap"}]}),
            ),
            backup(|| json!({"sync": "incremental", "bitmap": "b"}), Finish::Itself),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "a transaction clears a bitmap and starts a backup",
        on: &QCOW2_TO_SMALL,
        steps: &[
            ADD_BITMAP,
            Step::Rewrite(20, 5),
            job(
                "transaction",
                || {
                    json!({"actions": [
                        {"type": "block-dirty-bitmap-clear", "data": {"node": "disk", "name": "b"}},
                        {"type": "blockdev-backup", "data": usual_backup()},
                    ]})
                },
                Finish::Itself,
            ),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "two backups end together or not at all",
        on: &TWO_PAIRS,
        steps: &[job(
            "transaction",
            || {
                json!({"properties": {"completion-mode": "grouped"}, "actions": [
                    {"type": "blockdev-backup", "data": usual_backup()},
                    {"type": "blockdev-backup", "data": {"job-id": "second", "device": "other", "target": "place", "sync": "full"}},
                ]})
            },
            Finish::Itself,
        )],
    },
    Script {
        name: "a transaction puts made layers on two disks",
        on: &TWO_PAIRS,
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
        on: &CHAIN_AND_EMPTY,
        steps: &[Step::Do(
            "blockdev-snapshot-sync",
            || json!({"node-name": "mid", "snapshot-file": "/s.img", "snapshot-node-name": "s", "format": "qcow2"}),
        )],
    },
    Script {
        name: "take an internal snapshot, write, delete it",
        on: &QCOW2_TO_SMALL,
        steps: &[
            Step::Do("blockdev-snapshot-internal-sync", || json!({"device": "disk", "name": "s"})),
            Step::Rewrite(30, 50),
            Step::Do("blockdev-snapshot-delete-internal-sync", || json!({"device": "disk", "name": "s"})),
        ],
    },
    Script {
        name: "a transaction takes two internal snapshots",
        on: &TWO_AND_EMPTY,
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
        on: &CHAIN,
        steps: &[Step::Do(
            "change-backing-file",
            || json!({"device": "top", "image-node-name": "mid", "backing-file": "/base.img"}),
        )],
    },
    Script {
        name: "reopen an image read-only and back",
        on: &CHAIN,
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
        on: &SMALL,
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
        on: &QCOW2_TO_RAW,
        steps: &[job(
            "x-blockdev-amend",
            || json!({"job-id": "job", "node-name": "disk", "options": {"driver": "qcow2"}}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "shrink an image",
        on: &CLOSED,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/base.img"}}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 12 << 10})),
            CLOSE_N,
        ],
    },
    Script {
        name: "grow a raw image and a qcow2 image of small clusters",
        on: &TWO_AND_EMPTY,
        steps: &[
            Step::Do("block_resize", || json!({"node-name": "other", "size": 1 << 20})),
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/newer.img"}, "backing": null}),
            ),
            Step::Do("block_resize", || json!({"node-name": "n", "size": 64 << 20})),
            CLOSE_N,
        ],
    },
    Script {
        name: "read one instant through copy-before-write",
        on: &DISK_AND_TWO,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "copy-before-write", "node-name": "cbw", "file": "disk", "target": "target"}),
            ),
            Step::Do(
                "blockdev-add",
                || json!({"driver": "snapshot-access", "node-name": "instant", "file": "cbw"}),
            ),
            job(
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
        on: &QCOW2_TO_SMALL,
        steps: &[
            Step::Rewrite(0, 5),
            Step::Rewrite(600, 30),
            backup(|| json!({"x-perf": {"max-chunk": 65536, "max-workers": 2}}), Finish::Itself),
            Step::Rewrite(300, 10),
        ],
    },
    Script {
        name: "back up through a buffer",
        on: &BUFFERED,
        steps: &[
            Step::Do("blockdev-add", || {
                json!({"driver": "qcow2", "node-name": "buffer", "discard": "unmap",
                       "file": {"driver": "file", "filename": "/buffer.img", "discard": "unmap"}})
            }),
            backup(|| json!({"buffer": "buffer", "buffer-size": 65536}), Finish::Itself),
            Step::Rewrite(205, 40),
        ],
    },
    Script {
        name: "mirror what a bitmap marks, soft cancel",
        on: &QCOW2_TO_RAW,
        steps: &[
            ADD_BITMAP,
            Step::Rewrite(20, 70),
            job(
                "blockdev-mirror",
                || {
                    json!({"job-id": "job", "device": "disk", "target": "target", "sync": "incremental",
                           "bitmap": "b"})
                },
                Finish::Stop,
            ),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "mirror all with a persistent bitmap that says what is left",
        on: &QCOW2_TO_SMALL,
        steps: &[
            Step::Do(
                "block-dirty-bitmap-add",
                || json!({"node": "disk", "name": "b", "persistent": true, "all-dirty": true}),
            ),
            job(
                "blockdev-mirror",
                || {
                    json!({"job-id": "job", "device": "disk", "target": "target", "sync": "full",
                           "bitmap": "b", "bitmap-mode": "always"})
                },
                Finish::Complete,
            ),
            REMOVE_BITMAP,
        ],
    },
    Script {
        name: "commit the active layer in write-blocking mode, small clusters",
        on: &SMALL,
        steps: &[commit(|| json!({"copy-mode": "write-blocking"}), Finish::Complete)],
    },
    Script {
        name: "mirror and compare all",
        on: &RAW_TO_QCOW2,
        steps: &[mirror(|| json!({"verify": "full"}), Finish::Complete)],
    },
    Script {
        name: "give an image with a persistent bitmap up and take it back",
        on: &CLOSED,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/mid.img"}}),
            ),
            Step::Do(
                "block-dirty-bitmap-add",
                || json!({"node": "n", "name": "b", "persistent": true, "granularity": 4096}),
            ),
            Step::Do("blockdev-set-active", || json!({"node-name": "n", "active": false})),
            Step::Do("blockdev-set-active", || json!({"node-name": "n", "active": true})),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "n", "name": "b"})),
            CLOSE_N,
        ],
    },
    Script {
        name: "open an image inactive, take it, give it up, close it",
        on: &CLOSED,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "qcow2", "node-name": "n", "active": false, "file": {"driver": "file", "filename": "/base.img"}}),
            ),
            Step::Do("blockdev-set-active", || json!({"node-name": "n", "active": true})),
            Step::Do("blockdev-set-active", || json!({"active": false, "node-name": "n"})),
            CLOSE_N,
        ],
    },
    Script {
        name: "merge into a persistent bitmap",
        on: &QCOW2_TO_SMALL,
        steps: &[
            ADD_PERSISTENT_BITMAP,
            Step::Do(
                "block-dirty-bitmap-add",
                || json!({"node": "disk", "name": "c", "persistent": true, "granularity": 512}),
            ),
            Step::Rewrite(30, 50),
            Step::Do("block-dirty-bitmap-merge", || json!({"node": "disk", "target": "b", "bitmaps": ["c"]})),
            Step::Do("block-dirty-bitmap-remove", || json!({"node": "disk", "name": "c"})),
            REMOVE_BITMAP,
        ],
    },
];
