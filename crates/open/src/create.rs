//! Making new images: what `blockdev-create` does for each driver.

use crate::Opener;
use block::{Prealloc, Result};
use graph::{Demand, Parent, Perms, Role};

impl Opener {
    /// Makes an empty file.
    pub async fn create_file(&self, filename: &str, size: u64, prealloc: Prealloc) -> Result<()> {
        drivers::file::create(self.graph().env(), filename, size, prealloc).await
    }

    /// Writes a new qcow2 image over whatever the node `file` holds; `data` is the node of its external data file.
    pub async fn create_qcow2(
        &self,
        file: &str,
        data: Option<&str>,
        options: &qcow2::create::Options,
    ) -> Result<()> {
        options.validate()?;
        let demand = Demand {
            needs: Perms::CONSISTENT_READ.with(Perms::WRITE).with(Perms::RESIZE),
            shares: Perms::NONE.with(Perms::WRITE_UNCHANGED).with(Perms::CONSISTENT_READ),
        };
        let hold = async |name: &str| {
            let cell = self.find(name)?;
            let parent = Parent::Backend("blockdev-create".to_owned());
            self.graph().attach(&cell, "root", Role::Root, parent, demand).await
        };
        let file = hold(file).await?;
        let data = match data {
            Some(name) => Some(hold(name).await?),
            None => None,
        };
        qcow2::create::create(&file, data.as_ref(), options).await
    }
}
