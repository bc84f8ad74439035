//! Scripts whose copies go through filters, and those that delete what has left a chain; each of their I/Os is failed in turn (see
//! `nth`, whose seeds count on from the last of `nth_table`: add at the end).

use super::nth::{Finish, Script, Step};
use super::nth_stacks::{BY_HEADER, DISK_AND_TWO_RAW, QCOW2_TO_RAW, QCOW2_TO_SMALL};
use super::nth_table::{backup, commit, mirror, stream};
use serde_json::{Value, json};

/// The node in between that a copy goes to.
fn through() -> Value {
    json!({"target": "filter"})
}

const CLOSE_FILTER: Step = Step::Do("blockdev-del", || json!({"node-name": "filter"}));

const ADD_QUORUM: Step = Step::Do(
    "blockdev-add",
    || json!({"driver": "quorum", "node-name": "filter", "vote-threshold": 2, "children": ["first", "second"]}),
);

pub(super) const SCRIPTS: &[Script] = &[
    Script {
        name: "commit the middle, whose image is deleted",
        on: &BY_HEADER,
        steps: &[commit(
            || json!({"top": "/mid.img", "base": "/base.img", "delete-images": true}),
            Finish::Itself,
        )],
    },
    Script {
        name: "stream all, what was below is deleted",
        on: &BY_HEADER,
        steps: &[stream(|| json!({"delete-images": true}), Finish::Itself)],
    },
    Script {
        name: "stream down to the base, the middle is deleted, by hand",
        on: &BY_HEADER,
        steps: &[stream(
            || json!({"base": "/base.img", "delete-images": true, "auto-finalize": false, "auto-dismiss": false}),
            Finish::ByHand,
        )],
    },
    Script {
        name: "commit the active layer, what was above is deleted",
        on: &BY_HEADER,
        steps: &[commit(|| json!({"delete-images": true}), Finish::Complete)],
    },
    Script {
        name: "back up through a throttle",
        on: &QCOW2_TO_SMALL,
        steps: &[
            Step::Do(
                "object-add",
                || json!({"qom-type": "throttle-group", "id": "g", "limits": {"bps-total": 4 << 20, "iops-total": 500}}),
            ),
            Step::Do(
                "blockdev-add",
                || json!({"driver": "throttle", "node-name": "filter", "throttle-group": "g", "file": "target"}),
            ),
            backup(through, Finish::Itself),
            CLOSE_FILTER,
            Step::Do("object-del", || json!({"id": "g"})),
        ],
    },
    Script {
        name: "mirror to a quorum of two, soft cancel",
        on: &DISK_AND_TWO_RAW,
        steps: &[ADD_QUORUM, mirror(through, Finish::Stop), CLOSE_FILTER],
    },
    Script {
        name: "back up to a quorum that loses a child and gets it back",
        on: &DISK_AND_TWO_RAW,
        steps: &[
            Step::Do(
                "blockdev-add",
                || json!({"driver": "quorum", "node-name": "filter", "vote-threshold": 1, "children": ["first", "second"]}),
            ),
            backup(through, Finish::Itself),
            Step::Do("x-blockdev-change", || json!({"parent": "filter", "child": "children.1"})),
            Step::Do("x-blockdev-change", || json!({"parent": "filter", "node": "second"})),
            CLOSE_FILTER,
        ],
    },
    Script {
        name: "mirror to a target that is allocated ahead",
        on: &QCOW2_TO_RAW,
        steps: &[
            Step::Do("blockdev-add", || {
                json!({"driver": "preallocate", "node-name": "filter", "file": "target",
                       "prealloc-align": 65536, "prealloc-size": 131072})
            }),
            mirror(through, Finish::Stop),
            CLOSE_FILTER,
        ],
    },
];
