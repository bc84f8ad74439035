//! Images that qemu-img makes, opened by the running driver.

use crate::peer::TempDir;
use env::Env;
use graph::Role;
use qcow2::testing::file::FileNode;
use qcow2::testing::history::command;
use qcow2::{Options, Qcow2};
use std::future::Future;
use std::path::Path;
use std::rc::Rc;

impl TempDir {
    pub(crate) fn file(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }
    pub(crate) fn create(&self, name: &str, options: &str, size: &str) -> String {
        let path = self.file(name);
        command("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &path, size]).unwrap();
        path
    }
}

pub(crate) fn run<T: 'static, F: Future<Output = T> + 'static>(work: impl FnOnce(Env) -> F) -> T {
    let executor = env::os::start(env::os::OsConfig::default());
    executor.run(work(executor.env()))
}

#[allow(dead_code)] // each test binary uses its own part
pub(crate) async fn open(env: &Env, path: &str, options: Options) -> block::Result<Rc<Qcow2>> {
    let file = FileNode::edge(env, Path::new(path), options.writable, Role::Primary).await?;
    Qcow2::open(env.clone(), file, None, options).await
}
