//! The vhost-user-blk export: a disk for a virtual machine, through rings in memory that both sides share.
//!
//! A machine monitor connects to the export's unix socket, hands over the guest's memory and the rings' addresses
//! (`session`), and from then on the guest and we talk through memory and event descriptors (`ring`). Requests enter the
//! graph through the export's edge, so jobs may put other nodes under it meanwhile.
//!
//! What can happen: one front end after the other (the next one waits in the listen queue); the export is deleted while
//! one is connected; a guest that does anything at all (see `chain`). What must stay true: a front end is served only when
//! all requests of the one before have ended; the edge is held until the last request has; the socket's file goes with the export.

mod chain;
mod device;
mod inflight;
mod lane;
mod packed;
mod packed_log;
mod request;
mod ring;
mod session;
mod split;
#[cfg(feature = "testing")]
pub mod testing;
mod wire;

pub use device::{DEFAULT_BLOCK_SIZE, VhostUserBlkOptions};

use crate::export::ExportInfo;
use block::{BlockError, Result};
use device::{Device, MAX_BLOCK_SIZE};
use env::os::messages::{MessageListener, MessageSocket};
use env::sync::{Notify, race};
use env::{Address, Env, TaskHandle};
use graph::Edge;
use graph::gate::Gated;
use session::BackChannel;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use vhost::vhost_user::message::BackendReq;

/// Pause after a failed accept, and after a front end was sent away for what it said: one that comes back at once and says
/// the same again shall not keep the thread busy.
const PAUSE: Duration = Duration::from_millis(100);

/// A node offered over vhost-user-blk.
pub(crate) struct VhostUserBlk {
    device: Rc<Device>,
    front: RefCell<Option<Rc<MessageSocket>>>,
    back: BackChannel,
    accepting: RefCell<Option<TaskHandle>>,
    shutting_down: Cell<bool>,
    closing: Notify,
    idle: Notify,
    /// Length that the front end was told last.
    told_len: Cell<u64>,
}

/// What can be said against the options before anything is done.
pub(crate) fn check(o: &VhostUserBlkOptions) -> Result<()> {
    let size = o.logical_block_size;
    if !size.is_power_of_two() || !(DEFAULT_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&size) {
        let range = format!("a power of 2 between {DEFAULT_BLOCK_SIZE} and {MAX_BLOCK_SIZE}");
        return Err(BlockError::invalid(format!("parameter logical-block-size must be {range}")));
    }
    if o.num_queues == 0 {
        return Err(BlockError::invalid("num-queues must be greater than 0"));
    }
    if !matches!(o.address, Address::Unix(_) | Address::Fd(_)) {
        return Err(BlockError::invalid("Only socket address types 'unix' and 'fd' are supported"));
    }
    Ok(())
}

impl VhostUserBlk {
    /// Listens and serves.
    pub(crate) async fn start(
        env: &Env,
        options: VhostUserBlkOptions,
        edge: Rc<Edge>,
    ) -> Result<Rc<VhostUserBlk>> {
        let listener = MessageListener::listen(env, &options.address)
            .await
            .map_err(|e| crate::nbd_server::listen_error(&options.address, e))?;
        let device = Rc::new(Device::new(env, options, edge));
        let export = Rc::new(VhostUserBlk {
            told_len: Cell::new(device.len()),
            device,
            front: RefCell::new(None),
            back: RefCell::new(None),
            accepting: RefCell::new(None),
            shutting_down: Cell::new(false),
            closing: Notify::new(),
            idle: Notify::new(),
        });
        let task = env.spawn("vhost-user-blk export", accept(export.clone(), listener));
        *export.accepting.borrow_mut() = Some(task);
        Ok(export)
    }

    pub(crate) fn id(&self) -> &str {
        &self.device.options().id
    }

    pub(crate) fn info(&self) -> ExportInfo {
        ExportInfo {
            id: self.id().to_owned(),
            kind: "vhost-user-blk",
            node_name: self.device.edge().child().name().to_owned(),
            shutting_down: self.shutting_down.get(),
        }
    }

    pub(crate) fn is_shutting_down(&self) -> bool {
        self.shutting_down.get()
    }

    /// Front ends connected, or not yet done with.
    pub(crate) fn clients(&self) -> usize {
        usize::from(self.front.borrow().is_some())
    }

    /// Listens no more, and cuts the front end off.
    pub(crate) fn close(&self) {
        if self.shutting_down.replace(true) {
            return;
        }
        if let Address::Unix(path) = &self.device.options().address {
            // gone already: somebody else has tidied up
            let _ = env::os::process::remove_file(path);
        }
        self.closing.notify_all();
        let front = self.front.borrow().clone();
        match front {
            Some(socket) => socket.shutdown(),
            // nothing is under way: the listener goes at once
            None => {
                if let Some(task) = self.accepting.take() {
                    task.cancel();
                }
            }
        }
    }

    /// Waits until the last front end's requests have ended. None of them waits for its turn in a throttle meanwhile.
    pub(crate) async fn drained(&self) {
        let _hurried = self.device.edge().hurry();
        while self.clients() > 0 {
            self.idle.wait().await;
        }
    }

    /// Tells the front end if the disk has another length than it knows.
    pub(crate) fn tell_length(&self) {
        let len = self.device.len();
        if self.told_len.replace(len) == len {
            return;
        }
        let Some(back) = self.back.borrow().clone() else { return };
        self.device.env.spawn("vhost-user-blk news", async move {
            // the front end reads the configuration space then; one that does not listen asks later anyway
            let _ = wire::send(&back, BackendReq::CONFIG_CHANGE_MSG as u32, false, &[], None).await;
        });
    }
}

async fn accept(export: Rc<VhostUserBlk>, listener: MessageListener) {
    while !export.is_shutting_down() {
        let socket =
            match race(async { Some(listener.accept().await) }, export.closing.wait()).await.flatten() {
                None => return,
                Some(Ok(socket)) => Rc::new(socket),
                Some(Err(_)) => {
                    export.device.env.sleep(PAUSE).await;
                    continue;
                }
            };
        *export.front.borrow_mut() = Some(socket.clone());
        let ended = session::serve(&export.device, &socket, &export.back).await;
        drop(socket);
        if export.is_shutting_down() {
            drop(listener);
            left(export);
            return;
        }
        export.front.take();
        export.idle.notify_all();
        if let Err(why) = ended {
            eprintln!("liveblkd: export '{}': {why}", export.id());
            race(export.device.env.sleep(PAUSE), export.closing.wait()).await;
        }
    }
}

/// The last front end of a closed export is done with: who waits for that may take the node, so our hold on it goes first.
fn left(export: Rc<VhostUserBlk>) {
    export.front.take();
    export.accepting.take();
    let waiting = export.clone();
    drop(export);
    waiting.idle.notify_all();
}
