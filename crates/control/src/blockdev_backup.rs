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
        min_cluster_size: min_cluster_size(f.signed("min-cluster-size"))?,
    })))
}

/// A size in bytes; QSD reads it without its sign.
pub(crate) fn min_cluster_size(given: Option<i64>) -> Result<u64, QmpError> {
    let given = given.unwrap_or(0);
    u64::try_from(given).map_err(|_| {
        let (read, most) = (given.cast_unsigned(), i64::MAX);
        QmpError::generic(format!("min-cluster-size too large: {read} > {most}"))
    })
}
