//! One front end's connection: from its first message until it goes away or is sent away.
//!
//! What can happen: messages in any order, with any contents and any descriptors (refused; what cannot be answered ends the
//! connection, as its state would be unclear); the front end dies while requests run (they run to their end, what they
//! answer goes into memory that we still have). What must stay true: a queue runs exactly while it has memory, addresses
//! and a bell, and is enabled; when this returns, no request of this front end is under way.
//! Protocol: vhost-user specification (docs/interop/vhost-user.rst of QEMU).

use super::device::{Device, feature};
use super::inflight::InflightLog;
use super::lane::{Basis, Layout};
use super::ring::{Bells, Ring, Start};
use super::wire::{self, Message};
use block::{BlockError, Result};
use env::os::event::EventFd;
use env::os::messages::MessageSocket;
use env::os::shared::vm_memory::ByteValued;
use env::os::shared::{self, GuestMemory, Region, WriteLog};
use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use vhost::vhost_user::message::{
    FrontendReq as Req, VhostUserConfig, VhostUserInflight, VhostUserLog, VhostUserMemory,
    VhostUserMemoryRegion, VhostUserMsgValidator, VhostUserProtocolFeatures as Protocol,
    VhostUserSingleMemoryRegion, VhostUserU64, VhostUserVringAddr, VhostUserVringAddrFlags,
    VhostUserVringState,
};

/// Regions of guest memory: as many as one message names descriptors for; QSD takes 509, no machine has as many.
const MAX_REGIONS: u64 = 32;
/// Longest piece of the configuration space that is given: the protocol's own limit.
const MAX_CONFIG: u32 = 256;
/// Descriptors of a queue: the most that virtio allows.
const MAX_RING: u32 = 32_768;
/// In the number of a message about a bell: there is no descriptor.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// The channel on which the front end hears from us.
pub(super) type BackChannel = RefCell<Option<Rc<MessageSocket>>>;

#[derive(Default)]
struct Setup {
    size: u16,
    /// Addresses in the front end's own memory.
    addresses: Option<VhostUserVringAddr>,
    base: u32,
    kick: Option<Rc<EventFd>>,
    call: Option<Rc<EventFd>>,
    error: Option<Rc<EventFd>>,
    enabled: bool,
    ring: Option<Rc<Ring>>,
}

struct Session<'a> {
    device: &'a Rc<Device>,
    socket: &'a Rc<MessageSocket>,
    back: &'a BackChannel,
    features: u64,
    protocol: Protocol,
    memory: Rc<GuestMemory>,
    queues: Vec<Setup>,
    log: Option<Rc<InflightLog>>,
}

/// An answer to a message.
enum Answer {
    /// None of its own; the sender may have asked to hear that all is well.
    Done,
    Number(u64),
    Bytes(Vec<u8>),
    WithFile(Vec<u8>, OwnedFd),
}

fn offered() -> Protocol {
    Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::BACKEND_REQ
        | Protocol::CONFIG
        | Protocol::INFLIGHT_SHMFD
        | Protocol::RESET_DEVICE
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::LOG_SHMFD
}

/// Serves a front end until it goes away or is sent away, and all its requests have ended. The error: why we ended it.
pub(super) async fn serve(device: &Rc<Device>, socket: &Rc<MessageSocket>, back: &BackChannel) -> Result<()> {
    let queues = (0..device.options().num_queues).map(|_| Setup::default());
    let mut session = Session {
        device,
        socket,
        back,
        features: 0,
        protocol: Protocol::empty(),
        memory: Rc::new(GuestMemory::map(Vec::new())?),
        queues: queues.collect(),
        log: None,
    };
    let result = session.talk().await;
    socket.shutdown();
    if let Some(channel) = back.take() {
        channel.shutdown();
    }
    session.stop_all().await;
    device.set_logging(false);
    device.set_write_log(None);
    result
}

impl Session<'_> {
    async fn talk(&mut self) -> Result<()> {
        while let Some(mut message) = Message::receive(self.socket).await? {
            let (request, wants_ack) = (message.request, message.wants_ack());
            let answer = self.handle(&mut message).await;
            let acks = wants_ack && self.protocol.contains(Protocol::REPLY_ACK);
            let (body, file) = match answer {
                Ok(Answer::Number(n)) => (n.to_le_bytes().to_vec(), None),
                Ok(Answer::Bytes(b)) => (b, None),
                Ok(Answer::WithFile(b, f)) => (b, Some(f)),
                Ok(Answer::Done) if acks => (0u64.to_le_bytes().to_vec(), None),
                Ok(Answer::Done) => continue,
                // who asked whether it went well can be told that it did not
                Err(_) if acks && !has_answer(request) => (1u64.to_le_bytes().to_vec(), None),
                Err(e) => return Err(e),
            };
            wire::send(self.socket, request, true, &body, file.as_ref()).await?;
        }
        Ok(())
    }

    async fn handle(&mut self, m: &mut Message) -> Result<Answer> {
        let request = Req::try_from(m.request).map_err(|_| m.refuse("is unknown"))?;
        match request {
            Req::GET_FEATURES => return Ok(Answer::Number(self.device.features())),
            Req::SET_FEATURES => self.set_features(m.value::<VhostUserU64>(0)?.value)?,
            Req::SET_OWNER => {}
            Req::RESET_OWNER | Req::RESET_DEVICE => self.reset().await,
            Req::GET_PROTOCOL_FEATURES => return Ok(Answer::Number(offered().bits())),
            Req::SET_PROTOCOL_FEATURES => {
                let bits = m.value::<VhostUserU64>(0)?.value;
                self.protocol = Protocol::from_bits(bits)
                    .filter(|p| offered().contains(*p))
                    .ok_or_else(|| m.refuse("takes protocol features that were not offered"))?;
            }
            Req::GET_QUEUE_NUM => return Ok(Answer::Number(self.queues.len() as u64)),
            Req::GET_MAX_MEM_SLOTS => return Ok(Answer::Number(MAX_REGIONS)),
            Req::SET_MEM_TABLE => self.set_memory(m)?,
            Req::ADD_MEM_REG => {
                let region = *m.value::<VhostUserSingleMemoryRegion>(0)?;
                if self.memory.regions() as u64 >= MAX_REGIONS {
                    return Err(m.refuse("names more regions than there are slots"));
                }
                let region = region_of(&region, m.descriptor()?);
                let memory = self.memory.with(region)?;
                self.use_memory(memory)?;
            }
            Req::REM_MEM_REG => {
                let r = *m.value::<VhostUserSingleMemoryRegion>(0)?;
                let memory = self.memory.without(r.guest_phys_addr, r.user_addr, r.memory_size)?;
                self.use_memory(memory)?;
            }
            Req::SET_LOG_BASE => {
                if !self.protocol.contains(Protocol::LOG_SHMFD) {
                    return Err(m.refuse("gives a log that is no file, which is not supported"));
                }
                let v: VhostUserLog = m.value(0)?;
                let log = WriteLog::new(m.descriptor()?, v.mmap_offset, v.mmap_size)?;
                self.device.set_write_log(Some(log));
                // it waits until nothing is marked in the old one any more
                return Ok(Answer::Number(0));
            }
            // to be rung at each mark: nobody waits for that
            Req::SET_LOG_FD => {}
            Req::SET_VRING_NUM => {
                let state: VhostUserVringState = m.value(0)?;
                let any = self.is_packed() || state.num.is_power_of_two();
                if state.num == 0 || state.num > MAX_RING || !any {
                    return Err(m.refuse("gives a bad ring size"));
                }
                self.stopped_queue(m, state.index)?.size = state.num as u16;
            }
            Req::SET_VRING_ADDR => self.set_addresses(m)?,
            Req::SET_VRING_BASE => {
                let state: VhostUserVringState = m.value(0)?;
                if !self.is_packed() && state.num > u32::from(u16::MAX) {
                    return Err(m.refuse("gives a bad ring position"));
                }
                self.stopped_queue(m, state.index)?.base = state.num;
            }
            Req::GET_VRING_BASE => return self.stop_queue(m).await,
            Req::SET_VRING_KICK => self.set_kick(m).await?,
            Req::SET_VRING_CALL => {
                let (index, bell) = self.bell(m)?;
                let (bell, queue) = (bell.map(Rc::new), &mut self.queues[index]);
                queue.call.clone_from(&bell);
                if let Some(ring) = &queue.ring {
                    ring.change_bells(|b| b.call = bell);
                }
            }
            Req::SET_VRING_ERR => {
                let (index, bell) = self.bell(m)?;
                let (bell, queue) = (bell.map(Rc::new), &mut self.queues[index]);
                queue.error.clone_from(&bell);
                if let Some(ring) = &queue.ring {
                    ring.change_bells(|b| b.error = bell);
                }
            }
            Req::SET_VRING_ENABLE => {
                let state: VhostUserVringState = m.value(0)?;
                self.enable(m, state.index, state.num != 0).await?;
            }
            Req::SET_BACKEND_REQ_FD => {
                let socket = MessageSocket::new(&self.device.env, m.descriptor()?)?;
                if let Some(old) = self.back.replace(Some(Rc::new(socket))) {
                    old.shutdown();
                }
            }
            Req::GET_CONFIG => return self.get_config(m),
            Req::SET_CONFIG => {
                let c: VhostUserConfig = m.value(0)?;
                let bytes = m.body.get(size_of::<VhostUserConfig>()..).unwrap_or_default();
                let bytes = bytes.get(..c.size as usize).ok_or_else(|| m.refuse("is too short"))?;
                self.device.set_config(c.offset, bytes)?;
            }
            Req::GET_INFLIGHT_FD => return self.new_log(m),
            Req::SET_INFLIGHT_FD => {
                let v: VhostUserInflight = m.value(0)?;
                if self.queues.iter().any(|q| q.ring.is_some()) {
                    return Err(m.refuse("comes while queues run"));
                }
                let file = m.descriptor()?;
                let (at, len) = (v.mmap_offset, v.mmap_size);
                let log = InflightLog::open(file, at, len, v.num_queues, v.queue_size, self.is_packed())?;
                self.log = Some(log);
            }
            _ => return Err(m.refuse("is not supported")),
        }
        self.start_ready()?;
        Ok(Answer::Done)
    }

    fn set_features(&mut self, bits: u64) -> Result<()> {
        let unknown = bits & !self.device.features();
        if unknown != 0 {
            return Err(BlockError::invalid(format!("features {unknown:#x} were not offered")));
        }
        let changed = (bits ^ self.features) & (feature::RING_PACKED | feature::EVENT_IDX) != 0;
        if changed && self.queues.iter().any(|q| q.ring.is_some()) {
            return Err(BlockError::invalid("the kind of a running queue's ring cannot change"));
        }
        self.features = bits;
        self.device.set_logging(bits & feature::LOG_ALL != 0);
        Ok(())
    }

    async fn reset(&mut self) {
        self.stop_all().await;
        self.features = 0;
        self.device.set_logging(false);
        for q in &mut self.queues {
            *q = Setup::default();
        }
    }

    fn set_memory(&mut self, m: &mut Message) -> Result<()> {
        let count = m.value::<VhostUserMemory>(0)?.num_regions as usize;
        if count > MAX_REGIONS as usize || count != m.descriptors.len() {
            return Err(m.refuse("has not one descriptor for each of its regions"));
        }
        let mut regions = Vec::with_capacity(count);
        for (i, file) in std::mem::take(&mut m.descriptors).into_iter().enumerate() {
            let at = size_of::<VhostUserMemory>() + i * size_of::<VhostUserMemoryRegion>();
            regions.push(region_of(&m.value(at)?, file));
        }
        let memory = GuestMemory::map(regions)?;
        self.use_memory(memory)
    }

    /// Running queues go over to the new memory; requests under way keep the old.
    fn use_memory(&mut self, memory: GuestMemory) -> Result<()> {
        let memory = Rc::new(memory);
        for q in &self.queues {
            let Some(ring) = &q.ring else { continue };
            let at = layout(q, &memory)?;
            let at =
                at.ok_or_else(|| BlockError::invalid("a running queue's ring is not in the guest's memory"))?;
            ring.remap(&memory, at)?;
        }
        self.memory = memory;
        Ok(())
    }

    fn queue(&mut self, m: &Message, index: u32) -> Result<&mut Setup> {
        self.queues.get_mut(index as usize).ok_or_else(|| m.refuse("names a queue that is not there"))
    }

    fn stopped_queue(&mut self, m: &Message, index: u32) -> Result<&mut Setup> {
        let q = self.queue(m, index)?;
        if q.ring.is_some() { Err(m.refuse("changes a queue that runs")) } else { Ok(q) }
    }

    fn set_addresses(&mut self, m: &Message) -> Result<()> {
        let a: VhostUserVringAddr = m.value(0)?;
        if !a.is_valid() {
            return Err(m.refuse("gives misaligned rings"));
        }
        let q = self.queue(m, a.index)?;
        match (&q.ring, q.addresses) {
            // the front end turns the log of writes on or off this way
            (Some(ring), Some(old)) if rings(&old) == rings(&a) => {
                ring.log_used_at(used_logged_at(&a));
                q.addresses = Some(a);
            }
            (Some(_), _) => return Err(m.refuse("changes a queue that runs")),
            (None, _) => q.addresses = Some(a),
        }
        Ok(())
    }

    /// The queue that a message about a bell is about, and the bell, if there is one.
    fn bell(&mut self, m: &mut Message) -> Result<(usize, Option<EventFd>)> {
        let number = m.value::<VhostUserU64>(0)?.value;
        let index = (number & 0xff) as usize;
        if index >= self.queues.len() {
            return Err(m.refuse("names a queue that is not there"));
        }
        if number & NO_DESCRIPTOR != 0 {
            return Ok((index, None));
        }
        Ok((index, Some(EventFd::new(&self.device.env, m.descriptor()?)?)))
    }

    async fn set_kick(&mut self, m: &mut Message) -> Result<()> {
        let (index, bell) = self.bell(m)?;
        let bell = bell.ok_or_else(|| m.refuse("asks for a queue without a bell, which is not supported"))?;
        self.pause(index).await;
        self.queues[index].kick = Some(Rc::new(bell));
        Ok(())
    }

    async fn enable(&mut self, m: &Message, index: u32, on: bool) -> Result<()> {
        self.queue(m, index)?.enabled = on;
        if !on {
            self.pause(index as usize).await;
        }
        Ok(())
    }

    /// Stops a queue so that it can go on where it was.
    async fn pause(&mut self, index: usize) {
        let Some(ring) = self.queues[index].ring.take() else { return };
        ring.stop();
        let base = ring.ended().await;
        self.queues[index].base = base;
    }

    async fn stop_queue(&mut self, m: &Message) -> Result<Answer> {
        let state: VhostUserVringState = m.value(0)?;
        self.queue(m, state.index)?;
        self.pause(state.index as usize).await;
        let q = &mut self.queues[state.index as usize];
        (q.kick, q.call) = (None, None);
        let answer = VhostUserVringState { index: state.index, num: q.base };
        Ok(Answer::Bytes(answer.as_slice().to_vec()))
    }

    async fn stop_all(&mut self) {
        self.queues.iter().filter_map(|q| q.ring.as_ref()).for_each(|r| r.stop());
        for index in 0..self.queues.len() {
            self.pause(index).await;
        }
    }

    fn get_config(&self, m: &Message) -> Result<Answer> {
        let c: VhostUserConfig = m.value(0)?;
        let fits = c.offset.checked_add(c.size).is_some_and(|end| end <= MAX_CONFIG);
        if !fits {
            // the protocol's way to say no
            return Ok(Answer::Bytes(Vec::new()));
        }
        let mut body = c.as_slice().to_vec();
        body.extend(self.device.config(c.offset, c.size));
        Ok(Answer::Bytes(body))
    }

    /// A new log for the front end to keep.
    fn new_log(&self, m: &Message) -> Result<Answer> {
        let mut v: VhostUserInflight = m.value(0)?;
        if v.num_queues == 0 || v.queue_size == 0 || u32::from(v.queue_size) > MAX_RING {
            return Err(m.refuse("asks for a log of nothing"));
        }
        v.mmap_size = InflightLog::len(v.num_queues, v.queue_size, self.is_packed());
        v.mmap_offset = 0;
        let file = shared::anonymous_file("vhost-inflight", v.mmap_size)?;
        Ok(Answer::WithFile(v.as_slice().to_vec(), file))
    }

    /// Whether rings are packed ones. The front end says so before anything that depends on it.
    fn is_packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    /// Starts each queue that has all it needs and does not run.
    fn start_ready(&mut self) -> Result<()> {
        let (protocol, packed) = (self.features & feature::PROTOCOL_FEATURES != 0, self.is_packed());
        for (index, q) in self.queues.iter_mut().enumerate() {
            let Some(kick) = q.kick.clone().filter(|_| q.ring.is_none() && (!protocol || q.enabled)) else {
                continue;
            };
            let Some(layout) = layout(q, &self.memory)? else { continue };
            let socket = self.socket.clone();
            let used_logged_at = q.addresses.as_ref().and_then(used_logged_at);
            q.ring = Some(Ring::start(
                self.device,
                Start {
                    packed,
                    basis: Basis {
                        layout,
                        base: q.base,
                        event_idx: self.features & feature::EVENT_IDX != 0,
                        log: self.log.clone(),
                        index: index as u16,
                    },
                    memory: self.memory.clone(),
                    kick,
                    bells: Bells { call: q.call.clone(), error: q.error.clone() },
                    used_logged_at,
                    lost_memory: Box::new(move || socket.shutdown()),
                },
            )?);
        }
        Ok(())
    }
}

fn rings(a: &VhostUserVringAddr) -> (u64, u64, u64) {
    (a.descriptor, a.available, a.used)
}

/// Where writes to the used ring are logged, if they are.
fn used_logged_at(a: &VhostUserVringAddr) -> Option<u64> {
    (a.flags & VhostUserVringAddrFlags::VHOST_VRING_F_LOG.bits() != 0).then_some(a.log)
}

/// Where a queue's ring lies in the guest's memory; `None` while that is not known.
fn layout(q: &Setup, memory: &GuestMemory) -> Result<Option<Layout>> {
    let Some(a) = q.addresses.filter(|_| q.size > 0 && memory.regions() > 0) else { return Ok(None) };
    let (descriptors, available, used) = rings(&a);
    let find = |user| {
        memory.guest_address(user).ok_or_else(|| {
            BlockError::invalid(format!("virtqueue at {user:#x} is not in the guest's memory"))
        })
    };
    Ok(Some(Layout {
        size: q.size,
        descriptors: find(descriptors)?,
        available: find(available)?,
        used: find(used)?,
    }))
}

fn region_of(r: &VhostUserMemoryRegion, file: OwnedFd) -> Region {
    Region { guest: r.guest_phys_addr, len: r.memory_size, user: r.user_addr, offset: r.mmap_offset, file }
}

/// Whether a message has an answer of its own, which cannot say that it failed.
fn has_answer(request: u32) -> bool {
    use Req::*;
    matches!(
        Req::try_from(request),
        Ok(GET_FEATURES
            | GET_PROTOCOL_FEATURES
            | GET_QUEUE_NUM
            | GET_MAX_MEM_SLOTS
            | GET_VRING_BASE
            | GET_CONFIG
            | GET_INFLIGHT_FD
            | SET_LOG_BASE)
    )
}
