//! Nodes as QMP shows them: `BlockDeviceInfo`, `ImageInfo`, dirty bitmaps, counters.

use crate::error::QmpError;
use bitmap::DirtyBitmap;
use drivers::file::FileNode;
use drivers::names;
use graph::{CopyRecord, DetectZeroes, Fact, NodeCell, NodeDetails, SnapshotDetails};
use qapi::{Map, Value, json};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;

/// Layers that a nested `backing-image` may have: what bounds the recursion (and the answer, which is quadratic in it).
const MAX_LAYERS: usize = 500;

/// Limits of a throttled device, which a node is not: always 0, always there.
const THROTTLE: [&str; 6] = ["iops_rd", "iops_wr", "iops", "bps_wr", "bps_rd", "bps"];

/// One element of `query-named-block-nodes`. With `flat` without what is below.
pub(crate) async fn node(cell: &Rc<NodeCell>, flat: bool) -> Result<Value, QmpError> {
    let details = cell.node().details().await?;
    let options = cell.options();
    let mut out: Map<String, Value> = THROTTLE.iter().map(|k| ((*k).to_owned(), json!(0))).collect();
    let detect_zeroes = match options.detect_zeroes {
        DetectZeroes::Off => "off",
        DetectZeroes::On => "on",
        DetectZeroes::Unmap => "unmap",
    };
    out.insert("detect_zeroes".into(), json!(detect_zeroes));
    out.insert("active".into(), json!(cell.is_active()));
    let depth = if flat { 0 } else { backing_depth(cell) };
    let names = names::exact_chain(cell).await?;
    out.insert("image".into(), image(cell, &details, &names, if flat { 0 } else { MAX_LAYERS }).await?);
    // a node that turns read-write on demand counts as read-write
    out.insert("ro".into(), json!(!cell.is_writable() && !options.may_turn));
    out.insert("node-name".into(), json!(cell.name()));
    out.insert("backing_file_depth".into(), json!(depth));
    out.insert("drv".into(), json!(cell.node().driver()));
    out.insert("write_threshold".into(), json!(cell.write_threshold()));
    if let (Some(name), Some(_)) = (names.get(1), cell.node().backing()) {
        out.insert("backing_file".into(), json!(name));
    }
    let own = details.records.iter().map(record);
    let all = cell.bitmaps();
    let bitmaps: Vec<Value> = own.chain(all.iter().rev().filter(|b| !b.hidden()).map(bitmap)).collect();
    if !bitmaps.is_empty() {
        out.insert("dirty-bitmaps".into(), json!(bitmaps));
    }
    out.insert("encrypted".into(), json!(false));
    let cache =
        json!({"no-flush": options.cache_no_flush, "direct": options.cache_direct, "writeback": true});
    out.insert("cache".into(), cache);
    out.insert("file".into(), json!(names.first()));
    Ok(Value::Object(out))
}

fn backing_depth(cell: &NodeCell) -> usize {
    let mut depth = 0;
    let mut at = cell.below();
    while let Some(below) = at {
        depth += 1;
        at = below.below();
    }
    depth
}

type Boxed<'a> = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + 'a>>;

/// `ImageInfo`, with up to `below` layers nested in it; `exact` are the names of `cell` and those layers.
fn image<'a>(
    cell: &'a Rc<NodeCell>,
    details: &'a NodeDetails,
    exact: &'a [String],
    below: usize,
) -> Boxed<'a> {
    Box::pin(async move {
        let driver = cell.node().driver();
        let mut out = Map::new();
        // a file of any length counts whole sectors
        out.insert("virtual-size".into(), json!(cell.node().len().next_multiple_of(block::SECTOR)));
        let (name, exact) = exact.split_first().map_or((&details.filename, exact), |(n, rest)| (n, rest));
        out.insert("filename".into(), json!(name));
        out.insert("format".into(), json!(driver));
        if let Some(size) = details.cluster_size {
            out.insert("cluster-size".into(), json!(size));
        }
        if let Some(size) = details.actual_size {
            out.insert("actual-size".into(), json!(size));
        }
        if let Some(specific) = format_specific(driver, details) {
            out.insert("format-specific".into(), specific);
        }
        if has_dirty_flag(cell) {
            out.insert("dirty-flag".into(), json!(details.dirty_flag.unwrap_or(false)));
        }
        if !details.snapshots.is_empty() {
            let list: Vec<Value> = details.snapshots.iter().map(snapshot).collect();
            out.insert("snapshots".into(), list.into());
        }
        if let Some(true) = details.compressed {
            out.insert("compressed".into(), json!(true));
        }
        if let Some(name) = &details.backing_filename {
            out.insert("backing-filename".into(), json!(name));
            out.insert("full-backing-filename".into(), json!(names::full_name(&details.filename, name)));
            if let Some(format) = &details.backing_format {
                out.insert("backing-filename-format".into(), json!(format));
            }
        }
        if let (Some(child), true) = (cell.below(), below > 0) {
            let details = child.node().details().await?;
            out.insert("backing-image".into(), image(&child, &details, exact, below - 1).await?);
        }
        Ok(Value::Object(out))
    })
}

/// `SnapshotInfo`.
pub(crate) fn snapshot(s: &SnapshotDetails) -> Value {
    let (seconds, nanoseconds) = (s.vm_clock / 1_000_000_000, s.vm_clock % 1_000_000_000);
    let mut out = Map::new();
    out.insert("id".into(), json!(s.id));
    out.insert("name".into(), json!(s.name));
    out.insert("vm-state-size".into(), json!(s.vm_state_size));
    out.insert("date-sec".into(), json!(s.date.0));
    out.insert("date-nsec".into(), json!(s.date.1));
    out.insert("vm-clock-sec".into(), json!(seconds));
    out.insert("vm-clock-nsec".into(), json!(nanoseconds));
    out.extend(s.icount.map(|n| ("icount".to_owned(), json!(n))));
    Value::Object(out)
}

/// Whether QSD shows a dirty flag: it asks through raw nodes and filters, and not all drivers answer.
fn has_dirty_flag(cell: &Rc<NodeCell>) -> bool {
    let mut at = cell.clone();
    loop {
        let below = match at.node().driver() {
            "null-co" | "null-aio" | "nbd" | "quorum" => return false,
            "raw" => at.node().primary(),
            _ => at.node().filtered(),
        };
        match below {
            Some(edge) => at = edge.child(),
            None => return true,
        }
    }
}

fn fact_value(fact: &Fact) -> Value {
    match fact {
        Fact::Text(s) => json!(s),
        Fact::Number(n) => json!(n),
        Fact::Flag(b) => json!(b),
        Fact::List(all) => all.iter().map(fact_value).collect(),
        Fact::Record(all) => all
            .iter()
            .map(|(name, fact)| ((*name).to_owned(), fact_value(fact)))
            .collect::<Map<_, _>>()
            .into(),
    }
}

fn format_specific(driver: &str, details: &NodeDetails) -> Option<Value> {
    let data: Map<String, Value> =
        details.specific.iter().map(|(name, fact)| ((*name).to_owned(), fact_value(fact))).collect();
    match driver {
        "file" | "host_device" => Some(json!({"type": "file", "data": data})),
        _ if data.is_empty() => None,
        driver => Some(json!({"type": driver, "data": data})),
    }
}

/// A job's own record, as the bitmap without name that QSD has for it.
fn record(r: &CopyRecord) -> Value {
    json!({"recording": false, "persistent": false, "busy": false, "granularity": r.granularity, "count": r.dirty})
}

fn bitmap(b: &Rc<DirtyBitmap>) -> Value {
    let mut out = Map::new();
    if let Some(name) = b.name() {
        out.insert("name".into(), json!(name));
    }
    out.insert("recording".into(), json!(b.enabled()));
    out.insert("persistent".into(), json!(b.persistent()));
    if b.inconsistent() {
        out.insert("inconsistent".into(), json!(true));
        let why = b.why_inconsistent();
        if !why.is_empty() {
            out.insert("inconsistent-reason".into(), json!(why));
        }
    }
    out.insert("busy".into(), json!(b.busy()));
    let (granularity, count) = {
        let bits = b.bits();
        (bits.granularity(), bits.count())
    };
    out.insert("granularity".into(), json!(granularity));
    out.insert("count".into(), json!(count));
    Value::Object(out)
}

/// Counters that QSD keeps only for guest devices: always 0 for nodes, always there.
const NO_STATS: [&str; 24] = [
    "unmap_operations",
    "unmap_merged",
    "failed_zone_append_operations",
    "flush_total_time_ns",
    "wr_total_time_ns",
    "failed_wr_operations",
    "failed_rd_operations",
    "wr_merged",
    "failed_unmap_operations",
    "zone_append_merged",
    "failed_flush_operations",
    "rd_total_time_ns",
    "invalid_unmap_operations",
    "flush_operations",
    "unmap_bytes",
    "rd_merged",
    "unmap_total_time_ns",
    "invalid_flush_operations",
    "zone_append_total_time_ns",
    "zone_append_operations",
    "zone_append_bytes",
    "invalid_zone_append_operations",
    "invalid_wr_operations",
    "invalid_rd_operations",
];

/// One element of `query-blockstats`: what the node has counted (QSD counts nothing but the highest offset for nodes).
pub(crate) fn stats(cell: &Rc<NodeCell>) -> Value {
    let c = cell.counters();
    let mut stats: Map<String, Value> = NO_STATS.iter().map(|k| ((*k).to_owned(), json!(0))).collect();
    stats.insert("timed_stats".into(), json!([]));
    stats.insert("account_invalid".into(), json!(false));
    stats.insert("account_failed".into(), json!(false));
    stats.insert("wr_highest_offset".into(), json!(c.highest_written));
    stats.insert("rd_operations".into(), json!(c.reads));
    stats.insert("rd_bytes".into(), json!(c.read_bytes));
    stats.insert("wr_operations".into(), json!(c.writes));
    stats.insert("wr_bytes".into(), json!(c.written_bytes));
    let mut out = Map::new();
    out.insert("stats".into(), Value::Object(stats));
    out.insert("node-name".into(), json!(cell.name()));
    let node = cell.node();
    if let Some(file) = node.as_any().downcast_ref::<FileNode>() {
        let d = file.discard_stats();
        let specific = json!({
            "driver": node.driver(), "discard-nb-ok": d.done, "discard-nb-failed": d.failed, "discard-bytes-ok": d.bytes
        });
        out.insert("driver-specific".into(), specific);
    }
    if let Some(edge) = cell.node().primary() {
        out.insert("parent".into(), self::stats(&edge.child()));
    }
    if let Some(edge) = cell.node().backing() {
        out.insert("backing".into(), self::stats(&edge.child()));
    }
    Value::Object(out)
}
