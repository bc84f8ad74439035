//! Files that a job was to delete when it had taken their images out of a chain (`delete-images`), and that a crash left.
//!
//! They are recorded in the commit of the chain without them, and no more once they are deleted or it was told why not. A later life
//! deletes what it finds recorded when all else is there again. What must stay true: a file that anything may need is not deleted. So
//! as long as a node is missing, whose images nobody knows, all of it waits.

use super::Recorder;
use super::restore::Record;
use crate::Daemon;
use crate::error::QmpError;
use ::jobs::Leaving;
use qapi::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

/// One file.
fn row(l: &Leaving) -> (String, Vec<u8>) {
    let (device, inode) = l.identity;
    // what is no text cannot be recorded, and stays
    let value = json!({"job": l.job, "node-name": l.node, "filename": l.path.to_string_lossy(),
        "device": device, "inode": inode, "known": l.known.as_secs()});
    (format!("{device:x}.{inode:x}"), value.to_string().into_bytes())
}

fn parse(value: &Value) -> Option<Leaving> {
    let text = |key: &str| value[key].as_str().map(str::to_owned);
    Some(Leaving {
        job: text("job")?,
        node: text("node-name")?,
        path: PathBuf::from(text("filename")?),
        identity: (value["device"].as_u64()?, value["inode"].as_u64()?),
        known: Duration::from_secs(value["known"].as_u64()?),
    })
}

impl Recorder {
    pub(super) fn describe_leaving(&self, daemon: &Daemon) -> BTreeMap<String, Vec<u8>> {
        let jobs = daemon.jobs().list();
        let now = jobs.iter().filter_map(|j| j.body()).flat_map(|b| b.leaving());
        now.filter(|l| l.path.to_str().is_some()).map(|l| row(&l)).collect()
    }
}

impl Daemon {
    /// Deletes a file that an earlier life was to delete.
    pub(super) async fn restore_leaving(&self, recorder: &Recorder, record: &Record) -> Result<(), QmpError> {
        let leaving = parse(record.value()).ok_or_else(|| QmpError::generic("its record is damaged"))?;
        let missing = recorder.broken().into_iter().find(|b| b.kind() == "node");
        if let Some(node) = missing {
            let path = leaving.path.display();
            return Err(QmpError::generic(format!(
                "'{path}': node '{}' is not there and may need it",
                node.key
            )));
        }
        let outcome = self.while_held(async || Ok(leaving.delete(self.graph()).await?)).await;
        match outcome {
            Ok(true) => leaving.tell(self.jobs(), None),
            Ok(false) => {}
            Err(why) => leaving.tell(self.jobs(), Some(why.desc)),
        }
        Ok(())
    }
}
