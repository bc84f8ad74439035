//! All links to one export, kept up and replaced as they are lost.
//!
//! What can happen: the server restarts (requests wait for it as long as `reconnect-delay` says, and are sent again), it
//! comes back with another disk (refused: nobody may write there), it freezes (it is given up, where somebody asked for that), it takes only some of the connections we want (the
//! others go on trying in the background). What must stay true: a request ends at the latest `reconnect-delay` after its
//! link was lost and no other is up; attempts to connect are never closer than the pause of [`FIRST_PAUSE`] unless the
//! link before had worked.

use super::link::{Failure, Link, Outcome, Payload, Shared, lost};
use super::{FILL, NbdOptions};
use block::{BlockError, ErrorKind, Result, Span};
use env::sync::{Notify, Semaphore, Wait, race};
use env::{Env, File};
use graph::LinkState;
use nbd::proto::flag;
use nbd::{ClientWants, Cmd, Mode, Negotiated, leaf};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::time::Duration;

/// Pause before the second attempt to connect; doubled for each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How many times longer a server may be silent while it does nothing but flush: its disk may take its time, and a server that
/// is given up meanwhile gets the same bytes again.
const FLUSH_PATIENCE: u32 = 4;
/// How often it is looked whether a server is silent while that becomes too long.
const LOOKS: u32 = 4;
/// An attempt to connect again is given up after so long, and another one made: what a lost network swallowed is sent again
/// too late by the host itself.
const TRY_LIMIT: Duration = Duration::from_secs(10);
/// How long closing waits for changes that were called off: a server that has stopped must not keep us from ending.
const LANDING_LIMIT: Duration = Duration::from_secs(30);
/// How long a link for hashes may take to come up; then the bytes are read instead.
const HASH_LINK_WAIT: Duration = Duration::from_secs(2);

/// The links of one node.
pub(super) struct Pool {
    env: Env,
    options: NbdOptions,
    negotiated: Negotiated,
    links: RefCell<Vec<Option<Rc<Link>>>>,
    /// When the last link was lost, while there is none.
    dark_since: Cell<Option<Duration>>,
    /// Why the last link was lost.
    last_loss: RefCell<Option<BlockError>>,
    shared: Shared,
    /// Those who bridge losses, and the shortest time after which a silent server is given up.
    attending: RefCell<Vec<Option<Duration>>>,
    /// Why the server that came back is not taken.
    refused: RefCell<Option<BlockError>>,
    /// Why the last attempt to connect again failed.
    last_try: RefCell<Option<BlockError>>,
    /// When the next attempt begins, if one waits for that.
    next_try: Cell<Option<Duration>>,
    /// A link came up or was lost, or the pool closed.
    changed: Notify,
    /// Somebody new waits for a link: the next attempt begins now.
    hurry: Notify,
    closing: Notify,
    closed: Cell<bool>,
    /// A link of its own for hashes, once it is wanted.
    hashes: RefCell<HashLink>,
    /// One at a time makes it.
    making: Semaphore,
}

/// Where hashes are asked for.
#[derive(Clone, Default)]
enum HashLink {
    /// Nobody has wanted any.
    #[default]
    Untried,
    /// The server tells none.
    Never,
    There(Rc<Link>),
}

fn wants(o: &NbdOptions) -> ClientWants {
    let context = o.x_dirty_bitmap.clone().unwrap_or_else(|| "base:allocation".to_owned());
    ClientWants {
        export: o.export.clone(),
        mode: Mode::Extended,
        contexts: vec![context],
        tls: o.tls.is_some(),
    }
}

impl Pool {
    /// Connects for the first time, trying as long as `open-timeout` says.
    pub(super) async fn open(env: &Env, options: NbdOptions) -> Result<Rc<Pool>> {
        let end = env.now() + Duration::from_secs(u64::from(options.open_timeout));
        let (mut pause, shared) = (FIRST_PAUSE, Shared::default());
        let first = loop {
            let tls = options.tls.as_ref();
            match Link::connect(env, &options.server, tls, wants(&options), &shared).await {
                Ok(link) => break link,
                Err(e) if env.now() >= end => return Err(e),
                Err(_) => {
                    env.sleep(pause.min(end.saturating_sub(env.now()))).await;
                    pause = (pause * 2).min(Duration::from_secs(1));
                }
            }
        };
        let negotiated = first.negotiated().clone();
        let several = negotiated.flags & flag::CAN_MULTI_CONN != 0;
        let count = if several { options.connections.max(1) } else { 1 };
        let mut links = vec![None; count as usize];
        links[0] = Some(first.clone());
        let pool = Rc::new(Pool {
            env: env.clone(),
            options,
            negotiated,
            links: RefCell::new(links),
            dark_since: Cell::new(None),
            last_loss: RefCell::new(None),
            shared,
            attending: RefCell::default(),
            refused: RefCell::default(),
            last_try: RefCell::default(),
            next_try: Cell::new(None),
            changed: Notify::new(),
            hurry: Notify::new(),
            closing: Notify::new(),
            closed: Cell::new(false),
            hashes: RefCell::default(),
            making: Semaphore::new(1),
        });
        for place in 0..count as usize {
            let (keeper, first) = (pool.clone(), if place == 0 { Some(first.clone()) } else { None });
            env.spawn("nbd client keeper", async move { keeper.keep(place, first).await });
        }
        Ok(pool)
    }

    pub(super) fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }
    pub(super) fn options(&self) -> &NbdOptions {
        &self.options
    }

    /// Keeps one place filled until the pool closes.
    async fn keep(&self, place: usize, mut link: Option<Rc<Link>>) {
        let mut pause = FIRST_PAUSE;
        while !self.closed.get() {
            match link.take() {
                Some(l) => {
                    self.until_over(&l).await;
                    self.lose(place, l.over_because());
                    if l.has_answered() {
                        pause = FIRST_PAUSE;
                        link = self.connect().await;
                    }
                }
                None => link = self.connect().await,
            }
            match &link {
                Some(l) if !self.closed.get() => self.install(place, l),
                Some(l) => l.leave().await,
                None => {
                    self.next_try.set(Some(self.env.now() + pause));
                    self.unless_closed(race(self.env.sleep(pause), self.hurry.wait())).await;
                    self.next_try.set(None);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }

    /// Waits until the link is over; ends it if its server is silent for longer than somebody above wants to wait.
    async fn until_over(&self, link: &Link) {
        while link.is_up() {
            let limit = self.attending.borrow().iter().flatten().min().copied();
            let Some(limit) = limit else {
                let attended = self.changed.wait();
                race(link.over(), attended).await;
                continue;
            };
            let look = limit / LOOKS;
            let limit = if link.only_flushes() { limit * FLUSH_PATIENCE } else { limit };
            let now = self.env.now();
            let hashes = match &*self.hashes.borrow() {
                HashLink::There(hashes) => Some(hashes.clone()),
                HashLink::Never | HashLink::Untried => None,
            };
            let asked = hashes.as_ref().and_then(|h| h.silent_since());
            let since = [link.silent_since(), asked].into_iter().flatten().min();
            let end = since.unwrap_or(now) + limit;
            if end <= now {
                let why = format!("the server has not answered for {} seconds", limit.as_secs_f64());
                hashes.iter().for_each(|h| h.fail(&lost(&why)));
                link.fail(&lost(&why));
                return;
            }
            self.env.timeout((end - now).min(look), link.over()).await;
        }
    }

    /// What `doing` gives, or `None` as soon as the pool is closed.
    async fn unless_closed<T>(&self, doing: impl Future<Output = T>) -> Option<T> {
        let closing = self.closing.wait();
        if self.closed.get() {
            return None;
        }
        race(doing, closing).await
    }

    async fn connect(&self) -> Option<Rc<Link>> {
        let o = &self.options;
        let tls = o.tls.as_ref();
        let connecting = Box::pin(Link::connect(&self.env, &o.server, tls, wants(o), &self.shared));
        let made = self.unless_closed(self.env.timeout(TRY_LIMIT, connecting)).await?;
        let late = || Err(lost(&format!("no connection within {} seconds", TRY_LIMIT.as_secs())));
        let link = match made.unwrap_or_else(late) {
            Ok(link) => link,
            Err(e) => {
                *self.last_try.borrow_mut() = Some(e);
                return None;
            }
        };
        let same = self.same_export(link.negotiated());
        if let Err(e) = &same {
            link.fail(e);
        }
        *self.refused.borrow_mut() = same.err();
        self.changed.notify_all();
        link.is_up().then_some(link)
    }

    /// Whether what a later connection found is the disk that was opened.
    fn same_export(&self, now: &Negotiated) -> Result<()> {
        let was = &self.negotiated;
        let needed = flag::SEND_FLUSH
            | flag::SEND_FUA
            | flag::SEND_TRIM
            | flag::SEND_WRITE_ZEROES
            | flag::SEND_FAST_ZERO;
        let weaker = was.flags & needed & !now.flags != 0 || now.flags & !was.flags & flag::READ_ONLY != 0;
        let contexts = was.contexts.len() <= now.contexts.len();
        if now.size != was.size
            || now.min_block > was.min_block
            || now.max_block < was.max_block
            || weaker
            || !contexts
        {
            let message = "NBD server came back with another export";
            return Err(BlockError::corrupt(if now.size == was.size {
                message.to_owned()
            } else {
                format!("{message}: {} bytes instead of {}", now.size, was.size)
            }));
        }
        Ok(())
    }

    fn install(&self, place: usize, link: &Rc<Link>) {
        self.links.borrow_mut()[place] = Some(link.clone());
        self.last_try.take();
        self.dark_since.set(None);
        self.changed.notify_all();
    }

    fn lose(&self, place: usize, why: Option<BlockError>) {
        *self.last_loss.borrow_mut() = why;
        self.links.borrow_mut()[place] = None;
        if self.pick().is_none() && self.dark_since.get().is_none() {
            self.dark_since.set(Some(self.env.now()));
        }
        self.changed.notify_all();
    }

    /// The first link with little to do, so that requests gather on few links; else the one with least.
    fn pick(&self) -> Option<Rc<Link>> {
        let links = self.links.borrow();
        let up = || links.iter().flatten().filter(|l| l.is_up());
        up().find(|l| l.load() < FILL).or_else(|| up().min_by_key(|l| l.load())).cloned()
    }

    /// Why there is no link, as far as is known.
    fn why_dark(&self) -> BlockError {
        let fresh = self.links.borrow().iter().flatten().find_map(|l| l.over_because());
        fresh
            .or_else(|| self.last_loss.borrow().clone())
            .unwrap_or_else(|| BlockError::new(ErrorKind::Io, "Connection to NBD server lost"))
    }

    /// Whether payloads may lie in this file; an error while no link is there to ask.
    pub(super) fn sends_from(&self, file: &Rc<dyn File>) -> Result<bool> {
        match self.links.borrow().iter().flatten().next() {
            Some(link) => Ok(link.sends_from(file)),
            None => Err(self.why_dark()),
        }
    }

    /// Waits until no change is under way that was called off.
    pub(super) async fn landed(&self) {
        self.shared.adrift.landed().await;
    }

    /// Makes a request on some link, again on another if that is lost.
    pub(super) async fn call(&self, cmd: Cmd, flags: u16, span: Span, payload: Payload) -> Result<Outcome> {
        let attended = !self.attending.borrow().is_empty();
        let seconds = if attended { 0 } else { self.options.reconnect_delay };
        let delay = Duration::from_secs(u64::from(seconds));
        let mut deadline = None;
        let mut attempts = 0;
        let mut last = None;
        loop {
            if cmd.changes() {
                self.landed().await;
            }
            if let Some(link) = self.pick() {
                attempts += 1;
                match link.call(cmd, flags, span, payload.clone()).await {
                    Ok(outcome) => return Ok(outcome),
                    Err(Failure::Refused(e)) => return Err(e),
                    // A server that breaks the protocol would do so again.
                    Err(Failure::Lost(e)) if e.kind() == ErrorKind::Corrupt => return Err(e),
                    Err(Failure::Lost(e)) => last = Some(e),
                }
            }
            if self.closed.get() {
                return Err(BlockError::new(ErrorKind::Disconnected, "NBD client is closed"));
            }
            let now = self.env.now();
            let end = *deadline.get_or_insert(self.dark_since.get().unwrap_or(now) + delay);
            let changed = self.changed.wait();
            if self.pick().is_some() && (attempts <= self.links.borrow().len() || now < end) {
                continue;
            }
            if now >= end {
                let e = last.unwrap_or_else(|| self.why_dark());
                return Err(e.with_errno(BlockError::EIO));
            }
            self.env.timeout(end - now, changed).await;
        }
    }

    /// The link on which the server tells hashes; nothing if it tells none. A link of its own, so that other block status
    /// requests do not ask for hashes, too.
    pub(super) async fn hash_link(&self) -> Option<Rc<Link>> {
        let _turn = self.making.acquire(1).await;
        let known = self.hashes.borrow().clone();
        match known {
            HashLink::There(link) if link.is_up() => return Some(link),
            HashLink::Never => return None,
            HashLink::There(_) | HashLink::Untried => {}
        }
        let several = self.negotiated.flags & flag::CAN_MULTI_CONN != 0;
        if self.closed.get() || !several {
            return None;
        }
        let o = &self.options;
        let wants = ClientWants { contexts: vec![leaf::CONTEXT.to_owned()], ..wants(o) };
        // nothing is written there: its loss puts nothing in doubt
        let shared = Shared::default();
        let connecting = Box::pin(Link::connect(&self.env, &o.server, o.tls.as_ref(), wants, &shared));
        // a server that lets one client in at a time leaves the second waiting
        let connecting = self.env.timeout(HASH_LINK_WAIT, connecting);
        let link = self.unless_closed(connecting).await?.and_then(|l| l.ok());
        let good =
            |l: &Rc<Link>| l.negotiated().size == self.negotiated.size && !l.negotiated().contexts.is_empty();
        if let Some(other) = link.as_ref().filter(|l| !good(l)) {
            other.leave().await;
        }
        let link = link.filter(good);
        *self.hashes.borrow_mut() = link.clone().map_or(HashLink::Never, HashLink::There);
        link
    }

    /// Its hashes cannot be trusted: none are asked for any more.
    pub(super) fn no_hashes(&self) {
        let before = self.hashes.replace(HashLink::Never);
        if let HashLink::There(link) = before {
            link.fail(&BlockError::corrupt("NBD server told something else than hashes"));
        }
    }

    /// Hangs up everywhere. Requests that wait fail; what was called off lands before, if the server is not too slow.
    pub(super) async fn close(&self) {
        let landed = Box::pin(self.landed());
        self.env.timeout(LANDING_LIMIT, landed).await;
        self.stop();
        let links: Vec<_> = self.links.borrow_mut().iter_mut().filter_map(Option::take).collect();
        for l in links {
            l.leave().await;
        }
        let hashes = self.hashes.take();
        if let HashLink::There(l) = hashes {
            l.leave().await;
        }
    }

    /// Hangs up at once, without good-bye.
    pub(super) fn abandon(&self) {
        if self.closed.get() {
            return;
        }
        self.stop();
        let hashes = self.hashes.take();
        if let HashLink::There(l) = hashes {
            l.fail(&BlockError::new(ErrorKind::Disconnected, "NBD client is closed"));
        }
        for l in self.links.borrow().iter().flatten() {
            l.fail(&BlockError::new(ErrorKind::Disconnected, "NBD client is closed"));
        }
    }

    fn stop(&self) {
        self.closed.set(true);
        self.closing.notify_all();
        self.changed.notify_all();
    }
}

impl graph::Link for Pool {
    fn losses(&self) -> u64 {
        self.shared.losses.get()
    }
    fn is_up(&self) -> bool {
        self.pick().is_some()
    }
    fn state(&self) -> LinkState {
        if self.closed.get() {
            return LinkState::Closed;
        }
        if self.pick().is_some() {
            return LinkState::Up;
        }
        match self.refused.borrow().clone() {
            Some(why) => LinkState::Refused(why),
            None => {
                let why = self.why_dark();
                let why = match &*self.last_try.borrow() {
                    Some(last) => why.clone().with_message(format!("{}; {}", why.message(), last.message())),
                    None => why,
                };
                LinkState::Down { why, next_try: self.next_try.get() }
            }
        }
    }
    fn changed(&self) -> Wait<'_> {
        self.changed.wait()
    }
    fn attend(self: Rc<Self>, no_progress: Option<Duration>) -> Box<dyn Any> {
        self.attending.borrow_mut().push(no_progress);
        // whoever waits as long as the options say, and the keepers, look again
        self.changed.notify_all();
        self.hurry.notify_all();
        Box::new(Attention { pool: self, no_progress })
    }
}

/// Somebody bridges losses.
struct Attention {
    pool: Rc<Pool>,
    no_progress: Option<Duration>,
}

impl Drop for Attention {
    fn drop(&mut self) {
        let mut attending = self.pool.attending.borrow_mut();
        if let Some(at) = attending.iter().position(|a| *a == self.no_progress) {
            attending.swap_remove(at);
        }
    }
}
