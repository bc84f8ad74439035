//! What an image names by itself: its backing file and its external data file.
//!
//! An image may come from anywhere, so what it names is not opened just because it says so: an [`ImplicitOpenGate`] turns
//! the name into a [`NodeSpec`] or refuses. What must stay true: a name never reaches another driver than it plainly
//! says; a format that is not stated is looked for only to *read*, never to write.

use crate::spec::{DriverSpec, NbdSpec, NodeSpec};
use block::{BlockError, Result};
use drivers::null::NullOptions;
use env::Address;
use std::path::Path;

/// Longest chain of backing files. Real ones stay below 200 (libvirt's own limit); each layer costs a file descriptor.
pub const MAX_CHAIN: usize = 256;

/// Decides what an image may have opened.
pub trait ImplicitOpenGate {
    /// The protocol node for `name`, found in the header of the image `image` (its file name, for relative names).
    fn protocol(&self, image: &str, name: &str) -> Result<NodeSpec>;
}

/// QSD's rule: local files (relative ones beside the image), NBD addresses and disks that hold nothing; pseudo names that would smuggle options are
/// refused, with what to do instead.
pub struct DefaultGate;

impl ImplicitOpenGate for DefaultGate {
    fn protocol(&self, image: &str, name: &str) -> Result<NodeSpec> {
        if name.starts_with("json:") {
            return Err(BlockError::unsupported(format!(
                "image '{image}' names '{name}': options inside an image are not followed"
            ))
            .with_hint("open that node yourself and name it as `backing` (or `data-file`)"));
        }
        if name.starts_with(crate::blkcolo::PREFIX) {
            // it would let whoever made the image have a port opened, and a peer write to a file of this host
            return Err(BlockError::unsupported(format!(
                "image '{image}' names '{name}': a disk is not replicated because an image says so"
            ))
            .with_hint("add that node yourself and name it as `backing` (or `data-file`)"));
        }
        if let Some(rest) = name.strip_prefix("nbd+unix://") {
            let (export, query) = rest.split_once('?').unwrap_or((rest, ""));
            let socket = query.split('&').find_map(|p| p.strip_prefix("socket="));
            let Some(socket) = socket else {
                return Err(BlockError::invalid(format!("image '{image}' names '{name}' without a socket")));
            };
            return Ok(nbd(Address::Unix(socket.into()), export.trim_start_matches('/')));
        }
        if let Some(rest) = name.strip_prefix("nbd://") {
            let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
            let (host, port) = host.rsplit_once(':').unwrap_or((host, "10809"));
            let port = port.parse().map_err(|_| {
                BlockError::invalid(format!("image '{image}' names '{name}' with a bad port"))
            })?;
            return Ok(nbd(Address::tcp(host, port), export));
        }
        if let Some(path) = name.strip_prefix("file:") {
            // with a protocol in front it is no name beside the image: relative to the working directory, as in QSD
            return Ok(NodeSpec::file(path));
        }
        if let Some(driver) = ["null-co", "null-aio"].into_iter().find(|d| name == format!("{d}://")) {
            let driver = DriverSpec::NullCo(NullOptions { driver, ..NullOptions::default() });
            return Ok(NodeSpec { common: Default::default(), driver });
        }
        if let Some((protocol, _)) = name.split_once(':').filter(|(p, _)| is_protocol(p)) {
            return Err(BlockError::unsupported(format!(
                "image '{image}' names '{name}': protocol '{protocol}' is not supported"
            )));
        }
        let path = Path::new(name);
        let full = match Path::new(image).parent() {
            Some(dir) if path.is_relative() => dir.join(path),
            _ => path.to_path_buf(),
        };
        Ok(NodeSpec::file(&full.display().to_string()))
    }
}

fn nbd(server: Address, export: &str) -> NodeSpec {
    let options = drivers::nbd_client::NbdOptions::new(server, export);
    NodeSpec {
        common: Default::default(),
        driver: DriverSpec::Nbd(NbdSpec { options, tls_creds: None, tls_hostname: None }),
    }
}

/// Letters before the first colon, and no slash before it: a protocol, not a file name.
fn is_protocol(prefix: &str) -> bool {
    !prefix.is_empty() && prefix.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filename(image: &str, name: &str) -> String {
        match DefaultGate.protocol(image, name).expect("allowed").driver {
            DriverSpec::File(f) => f.filename,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn names_are_relative_to_the_image() {
        assert_eq!(filename("/a/b/top.qcow2", "base.qcow2"), "/a/b/base.qcow2");
        assert_eq!(filename("/a/b/top.qcow2", "file:base.qcow2"), "base.qcow2");
        assert_eq!(filename("/a/b/top.qcow2", "/c/base"), "/c/base");
        assert_eq!(filename("top", "./odd:name"), "./odd:name");
    }

    #[test]
    fn pseudo_names_and_unknown_protocols_are_refused_by_name() {
        for name in [
            "json:{\"driver\":\"file\"}",
            "blkcolo:h:1:/x",
            "ssh://host/x",
            "http://host/x",
            "fat:rw:/dir",
            "nbd+unix:///x",
        ] {
            let e = DefaultGate.protocol("/i", name).expect_err(name);
            assert!(e.message().contains(name), "{e}");
        }
    }
}
