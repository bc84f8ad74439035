//! A `copy-before-write` filter that a user adds: the filter, and what decides which old bytes it copies.

use crate::spec::CopyBeforeWriteSpec;
use crate::{Inherited, Opener, Trail};
use block::{BlockError, ErrorKind, Result};
use copy::{PointInTime, Work, cluster_size};
use drivers::filters::copy_before_write::CopyBeforeWrite;
use graph::bitmaps::{check_usable, find_bitmap};
use graph::{Demand, Role};
use std::rc::Rc;

impl Opener {
    /// Opens the filter; what it keeps is the disk as of now. Of one that an earlier life of the daemon had, the instant is lost:
    /// whoever reads it gets an error, not the disk as of another instant.
    pub(crate) async fn copy_before_write(
        &self,
        spec: &CopyBeforeWriteSpec,
        now: Inherited,
        name: &str,
        trail: &Trail,
    ) -> Result<Rc<CopyBeforeWrite>> {
        if now.inactive {
            // what it is there for is writing to its target
            return Err(BlockError::new(
                ErrorKind::Permission,
                "Permission 'write' unavailable on inactive node",
            ));
        }
        let file = self.child(&spec.file, now, trail).await?;
        let file = self.hold(&file, "file", Role::Filtered, name, Demand::NOTHING).await?;
        let target = self.child(&spec.target, now, trail).await?;
        let target = self.hold(&target, "target", Role::Other, name, Demand::NOTHING).await?;
        if file.child().id() == target.child().id() {
            return Err(BlockError::invalid("'file' and 'target' are the same node"));
        }
        let bits = match &spec.bitmap {
            None => None,
            Some((node, bitmap)) => Some(self.bits(node, bitmap)?),
        };
        let cluster = cluster_size(&target.child(), spec.min_cluster_size).await?;
        let work = Work::new(self.graph().env().clone(), file.len(), cluster)?;
        let node = CopyBeforeWrite::new(file.clone(), target.clone());
        let point = PointInTime::new(work, file, target, spec.rules);
        match bits {
            None => point.begin_all(),
            Some(bits) => point.begin(&bits),
        }
        if let Some(home) = self.bitmap_home().filter(|h| h.is_resuming()) {
            // What was overwritten before the restart is on the target, and nobody knows any more what of it is.
            let why = "the daemon was restarted, and what the disk contained at its instant is not known any more; add the node anew";
            point.lose(BlockError::new(ErrorKind::Permission, why));
            home.say_trouble(&format!("node '{name}': its snapshot is lost: {why}"));
        }
        node.set_keeper(Some(point));
        Ok(node)
    }

    fn bits(&self, node: &str, name: &str) -> Result<bitmap::Bitmap> {
        let cell = self.find(node)?;
        let bitmap = find_bitmap(&cell, name)?;
        check_usable(&bitmap)?;
        let bits = bitmap.bits().clone();
        Ok(bits)
    }
}
