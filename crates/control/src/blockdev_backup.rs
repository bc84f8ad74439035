//! Options of the filter `copy-before-write`.

use crate::blockdev::{Fields, child};
use crate::error::QmpError;
use copy::{KeepRules, OnSaveError};
use open::{CopyBeforeWriteSpec, DriverSpec};
use std::time::Duration;

/// The filter that a user adds.
pub(crate) fn copy_before_write(f: &Fields<'_>, depth: usize) -> Result<DriverSpec, QmpError> {
    let seconds = f.size("cbw-timeout")?.unwrap_or(0);
    let rules = KeepRules {
        on_error: match f.text("on-cbw-error") {
            Some("break-snapshot") => OnSaveError::LoseInstant,
            _ => OnSaveError::FailChange,
        },
        timeout: (seconds > 0).then(|| Duration::from_secs(seconds)),
        ..KeepRules::default()
    };
    let bitmap = f.object("bitmap").map(|b| (b.string("node"), b.string("name")));
    Ok(DriverSpec::CopyBeforeWrite(Box::new(CopyBeforeWriteSpec {
        file: child(f, "file", depth)?,
        target: child(f, "target", depth)?,
        bitmap,
        rules,
        min_cluster_size: f.unsigned("min-cluster-size").unwrap_or(0),
    })))
}
