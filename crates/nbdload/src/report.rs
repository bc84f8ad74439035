//! The figures of a load, as JSON.

use crate::latency::Histogram;
use std::time::Duration;

/// What a load did: requests of `bs` bytes each, over the time `took`, and this process's own processor time.
pub fn json(all: &Histogram, bs: u32, took: Duration, verified: bool) -> String {
    let secs = took.as_secs_f64();
    let usage = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let cpu = usage.tv_sec as f64 + usage.tv_nsec as f64 / 1e9;
    let n = all.total() as f64;
    format!(
        "{{\"requests\": {n}, \"seconds\": {secs:.3}, \"iops\": {:.0}, \"mib_per_s\": {:.1}, \"p50_us\": {:.1}, \
         \"p99_us\": {:.1}, \"p999_us\": {:.1}, \"cpu_seconds\": {cpu:.3}, \"verified\": {verified}}}",
        n / secs,
        n * f64::from(bs) / secs / f64::from(1 << 20),
        all.quantile_us(0.5),
        all.quantile_us(0.99),
        all.quantile_us(0.999),
    )
}
