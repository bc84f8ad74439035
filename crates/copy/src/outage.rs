//! Bridging the loss of a link: how long it is waited for, what is told meanwhile, and what is checked when it is back.
//!
//! What can happen: the peer of the target (or of the source) vanishes or freezes; it comes back at once, late, never, or as
//! another disk; it comes and goes. What must stay true: each loss is told, and so is its end; waiting ends when the user said
//! so; nothing is written to a peer that does not hold what it held; a peer that is back has had time to be done with what the
//! lost connection had brought it, before anything is written there again.

use crate::policy::{Action, Side};
use block::{BlockError, ErrorKind, Span};
use env::Env;
use env::sync::race;
use graph::{Edge, Link, LinkState};
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// How long after a peer is back nothing is written to it. NBD has no way to call off what a lost connection has brought to a
/// server that lives on, and two writes of the same bytes over two connections have no order.
pub const SETTLE: Duration = Duration::from_millis(500);
/// Places whose bytes are remembered as the target gave them after a flush.
const MAX_SAMPLES: usize = 64;
/// Of these, how many come from one flush.
pub(crate) const SAMPLES_PER_FLUSH: usize = 8;
/// Bytes of a sample.
pub(crate) const SAMPLE: u64 = 4096;

/// What a user chose to have done when the link to one side is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OnLinkLoss {
    /// How long the peer is waited for.
    pub wait: Duration,
    /// What is done then: [`Action::Stop`] or [`Action::Report`].
    pub then: Action,
    /// A peer that leaves requests unanswered for so long is lost; `None`: never.
    pub no_progress: Option<Duration>,
}

impl Default for OnLinkLoss {
    fn default() -> OnLinkLoss {
        OnLinkLoss {
            wait: Duration::from_secs(600),
            then: Action::Stop,
            // guests give up a request after 30 s
            no_progress: Some(Duration::from_secs(15)),
        }
    }
}

/// A link that is lost, and waited for.
#[derive(Clone, Debug)]
pub struct Outage {
    /// Whose.
    pub side: Side,
    /// Why.
    pub why: BlockError,
    /// Since when.
    pub since: Duration,
    /// When waiting ends.
    pub until: Duration,
    /// When the next attempt to connect begins, if none is under way.
    pub next_try: Option<Duration>,
}

struct Sample {
    at: u64,
    /// `None` while it is read for the first time.
    hash: Option<u64>,
}

/// The links of a copy and the user's rule about them.
pub struct Links {
    env: Env,
    rule: OnLinkLoss,
    target: Vec<Rc<dyn Link>>,
    source: Vec<Rc<dyn Link>>,
    /// Losses that have been told.
    told: Cell<u64>,
    outage: RefCell<Option<(Side, BlockError, Duration)>>,
    /// How much had been copied at the end of the last outage, and when that began: a peer that comes back and is lost again
    /// before anything else was copied has not been there.
    last: Cell<Option<(u64, Duration)>>,
    samples: RefCell<Vec<Sample>>,
    /// Outages so far.
    outages: Cell<u64>,
    attended: RefCell<Vec<Box<dyn Any>>>,
}

impl Links {
    /// Bridges losses of `target` and `source` by `rule`. While this lives requests to the target fail at once when its
    /// link is lost.
    pub fn new(
        env: &Env,
        rule: OnLinkLoss,
        target: Vec<Rc<dyn Link>>,
        source: Vec<Rc<dyn Link>>,
    ) -> Rc<Links> {
        let attended = target.iter().map(|l| l.clone().attend(rule.no_progress)).collect();
        let links = Links {
            env: env.clone(),
            rule,
            told: Cell::new(0),
            target,
            source,
            outage: RefCell::default(),
            last: Cell::default(),
            samples: RefCell::default(),
            outages: Cell::new(0),
            attended: RefCell::new(attended),
        };
        links.told.set(links.losses());
        Rc::new(links)
    }

    /// Losses are no longer bridged: requests to the target wait as its own options say, before others use it.
    pub fn release(&self) {
        self.attended.borrow_mut().clear();
    }

    /// The user's rule.
    pub fn rule(&self) -> OnLinkLoss {
        self.rule
    }

    fn losses(&self) -> u64 {
        self.target.iter().map(|l| l.losses()).sum()
    }

    fn side(&self, side: Side) -> &[Rc<dyn Link>] {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    /// Whether the target cannot be reached, or is not to be written yet.
    pub fn target_is_down(&self) -> bool {
        matches!(&*self.outage.borrow(), Some((Side::Target, ..))) || self.target.iter().any(|l| !l.is_up())
    }

    /// The outage that is waited for now.
    pub fn outage(&self) -> Option<Outage> {
        let (side, why, since) = self.outage.borrow().clone()?;
        let (mut reason, mut next_try) = (None, None);
        for link in self.side(side) {
            if let LinkState::Down { why, next_try: next } = link.state() {
                (reason, next_try) = (Some(why), next);
            }
        }
        Some(Outage { side, why: reason.unwrap_or(why), since, until: since + self.rule.wait, next_try })
    }

    /// How often a link was lost and waited for.
    pub fn outages(&self) -> u64 {
        self.outages.get()
    }

    /// Whether an error is nothing but the loss of a link that is waited for.
    pub fn explain(&self, side: Side, error: &BlockError) -> bool {
        let links = self.side(side);
        error.kind() == ErrorKind::Disconnected
            && !links.is_empty()
            && links.iter().all(|l| !matches!(l.state(), LinkState::Closed))
    }

    /// The side of which a link is down or was lost since it was last asked, if any, and why.
    pub(crate) fn trouble(&self) -> Option<(Side, BlockError)> {
        for side in [Side::Target, Side::Source] {
            for link in self.side(side) {
                match link.state() {
                    LinkState::Down { why, .. } | LinkState::Refused(why) => return Some((side, why)),
                    LinkState::Up | LinkState::Closed => {}
                }
            }
        }
        let lost = || BlockError::new(ErrorKind::Disconnected, "Connection to NBD server lost");
        (self.losses() != self.told.get()).then(|| (Side::Target, lost()))
    }

    /// An outage begins, when `done` bytes have been copied. `false`: it was known.
    pub(crate) fn begin(&self, side: Side, why: BlockError, done: u64) -> bool {
        if self.outage.borrow().is_some() {
            return false;
        }
        let since = match self.last.get() {
            Some((then, since)) if then == done => since,
            _ => self.env.now(),
        };
        self.outages.set(self.outages.get() + 1);
        *self.outage.borrow_mut() = Some((side, why, since));
        true
    }

    /// The outage is over, since the peer is back or since it is no longer waited for. How long it was.
    pub(crate) fn end(&self, done: Option<u64>) -> Duration {
        self.told.set(self.losses());
        let Some((_, _, since)) = self.outage.take() else { return Duration::ZERO };
        self.last.set(done.map(|d| (d, since)));
        self.env.now().saturating_sub(since)
    }

    /// Waits until all links are up and whoever is behind them has settled, and it is the same disk: `Ok`. Or until it is
    /// time to give up: why.
    pub(crate) async fn wait(&self, side: Side, target: &Edge) -> Result<(), BlockError> {
        // how many losses there were when all was up again, and when that will have been for long enough
        let mut back: Option<(u64, Duration)> = None;
        loop {
            // made before the looks, so that nothing is missed
            let mut changes: Vec<_> =
                self.target.iter().chain(&self.source).map(|l| Box::pin(l.changed())).collect();
            let changed = poll_fn(move |cx| {
                let any = changes.iter_mut().any(|c| c.as_mut().poll(cx).is_ready());
                if any { Poll::Ready(()) } else { Poll::Pending }
            });
            let Some(outage) = self.outage() else { return Ok(()) };
            let mut down = None;
            for link in self.side(side) {
                match link.state() {
                    LinkState::Up => {}
                    LinkState::Down { why, .. } => down = Some(why),
                    LinkState::Refused(why) => return Err(why),
                    LinkState::Closed => {
                        return Err(BlockError::new(ErrorKind::Disconnected, "the link was hung up"));
                    }
                }
            }
            let now = self.env.now();
            if let Some(why) = down {
                back = None;
                if now >= outage.until {
                    let waited = now.saturating_sub(outage.since).as_secs();
                    return Err(
                        why.context(format!("the {} did not come back within {waited} s", side.name()))
                    );
                }
                race(self.env.sleep(outage.until - now), changed).await;
                continue;
            }
            match back {
                Some((losses, when)) if losses == self.losses() && now >= when => {
                    match self.compare(target).await {
                        Err(e) if self.explain(Side::Target, &e) => back = None,
                        same => return same,
                    }
                }
                Some((losses, when)) if losses == self.losses() => {
                    race(self.env.sleep(when - now), changed).await;
                }
                _ => back = Some((self.losses(), now + SETTLE)),
            }
        }
    }

    /// `at` of the target is going to be written: what it held there is no sign of anything any more.
    pub(crate) fn forget(&self, at: Span) {
        self.samples.borrow_mut().retain(|s| Span::new(s.at, SAMPLE).intersect(&at).is_empty());
    }

    /// Remembers what the target, just flushed, holds at `places`, none of which is being written.
    pub(crate) async fn remember(&self, target: &Edge, places: &[u64]) {
        for &at in places {
            {
                let mut samples = self.samples.borrow_mut();
                samples.retain(|s| s.at != at);
                if samples.len() >= MAX_SAMPLES {
                    let which = self.env.random() % samples.len() as u64;
                    samples.swap_remove(which as usize);
                }
                samples.push(Sample { at, hash: None });
            }
            // one that cannot be read is none
            let read = target.read(Span::new(at, SAMPLE)).await.ok().map(|d| hash(&d));
            let mut samples = self.samples.borrow_mut();
            if let Some(i) = samples.iter().position(|s| s.at == at) {
                match read {
                    Some(hash) => samples[i].hash = Some(hash),
                    None => drop(samples.swap_remove(i)),
                }
            }
        }
    }

    /// Whether the target holds what it held. Nothing else is sent to it meanwhile.
    async fn compare(&self, target: &Edge) -> Result<(), BlockError> {
        let known: Vec<(u64, u64)> =
            self.samples.borrow().iter().filter_map(|s| s.hash.map(|h| (s.at, h))).collect();
        for (at, held) in known {
            let holds = hash(&target.read(Span::new(at, SAMPLE)).await?);
            // a guest may have written there since it was asked
            let still = self.samples.borrow().iter().any(|s| s.at == at && s.hash == Some(held));
            if holds != held && still {
                return Err(BlockError::corrupt(format!(
                    "the peer that came back does not hold what was written and flushed before at {at}: another image?"
                )));
            }
        }
        Ok(())
    }
}

/// FNV-1a over the bytes: tells images apart, proves nothing.
fn hash(data: &block::Data) -> u64 {
    let mut h = 0xcbf2_9ce4_8422_2325_u64;
    for b in data.to_vec() {
        h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    h
}
