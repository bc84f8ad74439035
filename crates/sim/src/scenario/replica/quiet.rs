//! Just before the primary loses its power: one write that all secondaries have committed, and that the primary's own disk may not keep: it
//! has not been flushed, or has not even reached the disk. Nothing else may remember the place, and the record of activity has to be
//! written again since, so nobody writes near it, and somebody far from it.
//!
//! Chance alone hardly ever brings this about; what it shows is that places are forgotten too early (I8).

use super::Run;
use super::turns::FAR;
use crate::guest::Disk;
use crate::history::What;
use crate::{Fault, Guest, Op, Refusal, Rule, stamped};
use block::SECTOR;
use std::rc::Rc;
use std::time::Duration;

/// A client of its own in the history.
const CLIENT: u32 = 9;
/// Sectors of the write.
const LEN: u64 = 16;

impl Run {
    /// Whether it came about that the write is everywhere else.
    pub(super) async fn quiet(self: &Rc<Self>) -> Result<bool, Refusal> {
        let primary = self.primary();
        if self.copies(&primary.info().await?) < self.sites.len() - 1 {
            return Ok(false);
        }
        self.guests.borrow().iter().for_each(Guest::abandon);
        // what they had begun ends
        self.env().sleep(Duration::from_millis(100)).await;
        // a disk that could not grow has no server: what waits for a secondary keeps it
        let Ok(disk) = primary.disk(&self.world).await else { return Ok(false) };
        let (at, under_way) = self.draw_aside(|r| (r.below(self.wishes.sectors - LEN), r.chance(0.5)));
        if under_way {
            primary.host.fault(Rule::once("/disk", Op::Write, Fault::Hang));
        }
        let (history, writer) = (self.history.clone(), disk.clone());
        let number = history.begin(CLIENT, What::Write, at..at + LEN);
        self.env().spawn("quiet write", async move {
            if writer.write(at * SECTOR, stamped(number, at, LEN), false).await.is_ok() {
                history.end(number);
            }
        });
        self.env().sleep(Duration::from_millis(100)).await;
        let before = primary.info().await?["committed-epoch"].clone();
        self.checkpoint().await?;
        self.env().sleep(Duration::from_millis(100)).await;
        let far = disk.write(FAR, stamped(number, FAR / SECTOR, 1), false);
        self.env().timeout(Duration::from_secs(1), far).await;
        disk.disconnect();
        let info = primary.info().await?;
        primary.host.clear_faults();
        let everywhere = info["committed-epoch"] != before && self.copies(&info) == self.sites.len() - 1;
        self.world.count("quiet before a power loss", u64::from(everywhere));
        Ok(everywhere)
    }
}
