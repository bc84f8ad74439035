//! What happens in replication, as events. The group of QEMU's composition is a node: its name stands where the native groups have
//! theirs.

use drivers::filters::replication::ReplicationEvent;
use qapi::{Value, json};

/// The events that tell of `event` in the replication node `node`.
pub(crate) fn events(node: &str, event: &ReplicationEvent) -> Vec<(&'static str, Value)> {
    match event {
        ReplicationEvent::Stage { old, new, reason } => {
            let data = json!({"group": node, "old": old.name(), "new": new.name(), "reason": reason});
            vec![("REPLICATION_STATE_CHANGE", data)]
        }
        ReplicationEvent::Error { operation, at, error } => {
            let data = json!({"group": node, "operation": operation, "errno": error.errno(),
                "offset": at.start, "reason": error.to_string()});
            let degraded = json!({"group": node, "reason": error.to_string()});
            vec![("REPLICATION_ERROR", data), ("REPLICATION_DEGRADED", degraded)]
        }
        ReplicationEvent::Veto { reason } => {
            vec![("REPLICATION_CHECKPOINT_VETO", json!({"group": node, "reason": reason}))]
        }
        ReplicationEvent::Failover { phase, error } => {
            let mut data = json!({"group": node, "phase": phase});
            if let (Some(error), Some(members)) = (error, data.as_object_mut()) {
                members.insert("reason".to_owned(), json!(error.to_string()));
            }
            vec![("REPLICATION_FAILOVER", data)]
        }
    }
}
