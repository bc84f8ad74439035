//! Image files that commands make and open for themselves: overlays of snapshots, targets of `drive-mirror` and `drive-backup`.

use crate::JobError;
use crate::chain::BackingName;
use block::Prealloc;
use graph::{NodeCell, walk};
use open::{Backing, Child, Common, DriverSpec, NodeSpec, Opener};
use std::rc::Rc;

type Made<T> = std::result::Result<T, JobError>;

/// Makes an image of `len` bytes in the file `file`; an overlay of `backing`, if that is given.
pub(crate) async fn create(
    opener: &Rc<Opener>,
    file: &str,
    format: &str,
    len: u64,
    backing: Option<&Rc<NodeCell>>,
) -> Made<()> {
    let file = match open::named(file)?.driver {
        DriverSpec::File(f) => f.filename,
        _ => return Err(JobError::refused(format!("'{file}' is no file that could be made"))),
    };
    let file = file.as_str();
    match format {
        "qcow2" => {}
        "raw" | "file" if backing.is_some() => {
            let message = format!("Backing file not supported for file format '{format}'");
            return Err(JobError::refused(message));
        }
        "raw" | "file" => return Ok(opener.create_file(file, len, Prealloc::Off).await?),
        other => return Err(JobError::refused(format!("Unknown file format '{other}'"))),
    }
    let backing = match backing {
        Some(node) => BackingName::of(&walk::skip_filters(node), None, false).await?,
        None => BackingName::NONE,
    };
    let options = qcow2::create::Options {
        backing_file: backing.name,
        backing_fmt: backing.format,
        ..qcow2::create::Options::new(len)
    };
    options.validate()?;
    opener.create_file(file, 0, Prealloc::Off).await?;
    let file = opener.open(&NodeSpec::file(file)).await?;
    let made = opener.create_qcow2(file.name(), None, &options).await;
    let closed = opener.graph().remove(&file).await;
    made?;
    Ok(closed?)
}

/// What is below an image when it is opened.
pub(crate) enum Below {
    /// Nothing, whatever its header says.
    Nothing,
    /// What its header says.
    Header,
    /// This node.
    Node(Rc<NodeCell>),
}

/// Opens `file`, tentatively. A format that is not given is looked for in it.
pub(crate) async fn open(
    opener: &Rc<Opener>,
    file: &str,
    format: Option<&str>,
    below: Below,
    common: Common,
) -> Made<Rc<NodeCell>> {
    let protocol = open::named(file)?;
    let format = match format {
        Some(format) => format.to_owned(),
        None => opener.probe_format(&protocol).await?.to_owned(),
    };
    let mut spec = match format.as_str() {
        "qcow2" => protocol.qcow2(),
        "raw" => protocol.raw(),
        "file" | "nbd" | "host_device" => protocol,
        other => return Err(JobError::refused(format!("Unknown driver '{other}'"))),
    };
    spec.common = common;
    if let DriverSpec::Qcow2(q) = &mut spec.driver {
        q.backing = match below {
            Below::Nothing => Backing::None,
            Below::Header => Backing::Implicit,
            Below::Node(node) => Backing::Child(Child::Reference(node.name().to_owned())),
        };
    }
    let cell = opener.open(&spec).await?;
    cell.set_tentative();
    Ok(cell)
}
