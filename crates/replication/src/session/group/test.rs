//! Trying a failover without one: clones of the group's disks as of one checkpoint.
//!
//! What must stay true: all clones of a test are the same checkpoint; a test that could not be begun leaves nothing behind.

use super::{Acting, Group, refused};
use crate::session::clone::CloneNode;
use crate::types::Epoch;
use block::Result;
use graph::{NodeCell, NodeOptions};
use std::rc::Rc;

/// A test that has begun.
pub struct Test {
    /// The checkpoint that it shows.
    pub epoch: Epoch,
    /// The nodes, one for each disk.
    pub cells: Vec<Rc<NodeCell>>,
}

impl Group {
    /// Makes nodes that show the disks as of a checkpoint, the newest if none is named: `name`, or where there are several disks
    /// `name-0`, `name-1`, ...
    ///
    /// # Errors
    /// This side is no secondary; there is no such checkpoint; a name in use; of the scratch files.
    pub async fn test_failover(&self, name: &str, epoch: Option<Epoch>) -> Result<Test> {
        let Acting::Secondary(secondary) = self.acting() else {
            return Err(refused(format!("Replication group '{}' is not a secondary", self.new.id)));
        };
        let hold = Rc::new(secondary.hold(epoch)?);
        let epoch = hold.epoch();
        let mut test = Test { epoch, cells: Vec::new() };
        for number in 0..self.fronts.len() {
            let name = if self.fronts.len() == 1 { name.to_owned() } else { format!("{name}-{number}") };
            let number = u16::try_from(number).unwrap_or(u16::MAX);
            let made = async {
                self.graph.check_name(&name)?;
                let mut scratch = self.new.store.clone().into_os_string();
                let env = self.graph.env();
                scratch.push(format!(".test-{:016x}", env.random()));
                let node = CloneNode::make(env, hold.clone(), number, scratch.as_ref()).await?;
                let options = NodeOptions { name: Some(name), monitor_owned: true, ..NodeOptions::default() };
                self.graph.add(options, node).await
            };
            match made.await {
                Ok(cell) => test.cells.push(cell),
                Err(e) => {
                    for cell in &test.cells {
                        // they have just been made, and nobody was told of them
                        let _ = self.graph.remove(cell).await;
                    }
                    return Err(e);
                }
            }
        }
        Ok(test)
    }

    /// The nodes of tests that go on, each with its checkpoint.
    pub fn tests(&self) -> Vec<(String, Epoch)> {
        let mine = |cell: &Rc<NodeCell>| {
            let node = cell.node();
            let clone = node.as_any().downcast_ref::<CloneNode>()?;
            (clone.group() == self.group).then_some(())?;
            Some((cell.name().to_owned(), clone.epoch()?))
        };
        match self.acting() {
            Acting::Secondary(_) => self.graph.nodes().iter().filter_map(mine).collect(),
            _ => Vec::new(),
        }
    }
}
