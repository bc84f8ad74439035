//! In what unit old bytes are copied away.

use block::{BlockError, Result};
use graph::{NodeCell, walk};
use std::rc::Rc;

/// Smallest unit that is copied: as QSD.
const MIN_CLUSTER: u64 = 64 << 10;
/// Largest unit: what memory holds for each copy in flight.
const MAX_CLUSTER: u64 = 64 << 20;

/// That a user's smallest unit is a size at all.
pub fn check_min_cluster(min: u64) -> Result<()> {
    match i64::try_from(min) {
        Ok(_) => Ok(()),
        Err(_) => Err(BlockError::invalid(format!("min-cluster-size too large: {min} > {}", i64::MAX))),
    }
}

/// The unit in which old bytes are copied to `target`: at least its clusters, so that none is filled twice.
pub async fn cluster_size(target: &Rc<NodeCell>, min: u64) -> Result<u64> {
    check_min_cluster(min)?;
    if min > 0 && !min.is_power_of_two() {
        return Err(BlockError::invalid(
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ));
    }
    if min > MAX_CLUSTER {
        return Err(BlockError::invalid(format!("min-cluster-size must not be above {MAX_CLUSTER}")));
    }
    let clusters = match walk::skip_filters(target).node().limits().cluster_size {
        0 => target.node().details().await.ok().and_then(|d| d.cluster_size).unwrap_or(0),
        c => c,
    };
    let clusters = if clusters.is_power_of_two() { clusters } else { 0 };
    Ok(clusters.max(min).clamp(MIN_CLUSTER, MAX_CLUSTER))
}
