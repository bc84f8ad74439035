//! The copy loop: take dirty work, look at extents, copy inside a window, count, limit the rate, apply the error policy.
//!
//! What can happen: anything in any order: guest writes, failures on either side, a pause, another speed, cancellation
//! (the engine is dropped: its copies end, their ranges become dirty again, nothing waits). What must stay true:
//! * A slot is taken before a copy exists, and given back when it is gone, whatever ended it.
//! * Two copies never overlap; a copy never waits for another.
//! * Each copy is a task of its own, so that the executor gives guest requests their turn in between.
//! * See [`Work`] for the order of dirty bits, locks and reads.

use crate::bugs::{Bug, planted};
use crate::check::{CheckTask, MAX_ZERO_CHECK, zeroes_ahead};
use crate::first::ASK;
use crate::piece::{Beside, Ended, FlushTask, Outcome, PieceTask, Shared, Turns};
use crate::policy::{Action, Control, Next, Policy, Side, Standing};
use crate::proof::Proof;
use crate::ranges::Owner;
use crate::status::status;
use crate::window::{
    MAX_BESIDE_GUEST, MAX_CHECKS, MAX_IN_FLIGHT_GUEST, MAX_PIECE, MAX_ZERO_PIECE, OFFLOAD_LEAST, Window,
};
use crate::work::Work;
use block::{BlockError, Extent, Kind, ReqFlags, Result, Span};
use env::TaskHandle;
use env::sync::{Queue, race};
use graph::{DetectZeroes, Edge, NodeCell};
use std::cell::Cell;
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

/// First wait before a failed request is tried again under `ignore`; doubles up to [`RETRY_MAX`], so that a permanent
/// error costs no processor and no flood of events.
const RETRY_FIRST: Duration = Duration::from_millis(10);
/// Longest wait between two tries under `ignore`.
const RETRY_MAX: Duration = Duration::from_secs(1);
/// Places in conflict with guest requests that are looked past in one search for work.
const MAX_SKIPS: u32 = 64;
/// Longest sleep without a look around: rates are sampled, and policies that depend on time are asked again.
const LOOK_AROUND: Duration = Duration::from_millis(500);
/// Wait before a comparison is tried again of which nothing could be said, because clients were changing all of it.
const UNCLEAR_WAIT: Duration = Duration::from_millis(1);
/// Copies in flight while a guest waits for the target to take old bytes: its own come first.
const COPIES_BESIDE_SAVING: u32 = 1;
/// Bytes that a target behind links takes between two flushes where losses of its links are bridged: so much, and what is taken
/// until the flush is done (at most as much again), has to be copied again after a loss.
const FLUSH_EVERY: u64 = 64 << 20;
/// The same where what is copied is released only when it is flushed.
const RELEASE_EVERY: u64 = 4 << 20;
/// How much of the disk is asked about at first, to find large runs of zeroes, and at the most: each question is about four times
/// as much as the one before, so that the copy begins at once and a large disk does not take many.
const HINT_FIRST: u64 = 32 << 20;
const HINT_MOST: u64 = ASK;

/// Copies from one edge to another what [`Work`] says is dirty.
pub struct Engine {
    shared: Rc<Shared>,
    control: Rc<dyn Control>,
    window: Window,
    outcomes: Rc<Queue<Ended>>,
    tasks: Vec<TaskHandle>,
    cursor: u64,
    /// What the source held when last asked; only for the choice of pieces, never for what is done with them.
    hints: Vec<Extent>,
    hinting: bool,
    hints_of: u64,
    hint_span: u64,
    retry: Option<(Duration, Duration)>,
    leave_on_pause: bool,
    checks: Checks,
    /// Bytes copied again because of losses, as far as told.
    told_again: u64,
    /// A node whose requests are the guest's, and how many it had when last looked at.
    watched: Option<(Rc<NodeCell>, u64)>,
}

/// Where the comparison is.
#[derive(Default)]
struct Checks {
    cursor: u64,
    /// The next piece is one to compare, if there is one: neither copying nor comparing waits for the other to end.
    turn: bool,
    /// Nothing is compared before that.
    not_before: Duration,
    /// Where both sides are zero, as far as was asked ahead; only for the choice of pieces.
    zeroes: Vec<Span>,
    known_to: u64,
    asking: bool,
}

/// What a search for work found.
enum Found {
    Piece(Span),
    /// All that is dirty is in use by guest requests; this is the first such granule.
    Contended(Span),
    Nothing,
}

impl Engine {
    /// An engine that has at most `buffer` bytes in flight.
    pub fn new(
        work: Rc<Work>,
        source: Rc<Edge>,
        target: Rc<Edge>,
        policy: Rc<dyn Policy>,
        control: Rc<dyn Control>,
        buffer: u64,
    ) -> Engine {
        let transfer = [source.limits().max_transfer, target.limits().max_transfer];
        let max_transfer = transfer.into_iter().filter(|t| *t > 0).min().unwrap_or(0);
        // detecting zeroes needs the bytes to pass through here
        // and so does recording what was read
        let recording = work.proof().is_some_and(|p| p.is_recording());
        let plain = !policy.unchanged() && !policy.compressed() && !recording;
        let links = control.links();
        links.iter().for_each(|l| work.bridge(l));
        let offload = target.child().options().detect_zeroes == DetectZeroes::Off && plain;
        let window = Window::new(buffer, work.granularity(), max_transfer);
        Engine {
            shared: Rc::new(Shared {
                work,
                source,
                target,
                policy,
                control: control.clone(),
                offload: Cell::new(offload),
                beside: Cell::new(0),
                tells_hashes: Cell::new(true),
                turns: Turns::new(),
                resting: Cell::new(false),
                flushing: Cell::new(false),
                links,
            }),
            control,
            window,
            outcomes: Rc::new(Queue::new()),
            tasks: Vec::new(),
            cursor: 0,
            hints: Vec::new(),
            hinting: false,
            hints_of: 0,
            hint_span: HINT_FIRST,
            retry: None,
            leave_on_pause: false,
            checks: Checks::default(),
            told_again: 0,
            watched: None,
        }
    }

    /// Under a rate limit copies in pieces of `bytes` instead of some that are as small as the rate. A disk that nobody
    /// writes to meanwhile has no use for small pieces.
    pub fn set_chunk(&mut self, bytes: u64) {
        self.window.set_chunk(bytes);
    }

    /// Pieces are kept short while requests pass through `node`. For a copy without a tap.
    pub fn watch(&mut self, node: Rc<NodeCell>) {
        let counters = node.counters();
        self.watched = Some((node, counters.reads + counters.writes));
    }

    /// At most `workers` copies in flight, in pieces of at most `piece` bytes (0: as by default).
    pub fn set_most(&mut self, workers: u32, piece: u64) {
        self.window.set_most(workers, piece);
    }

    /// Whether [`Engine::run`] and [`Engine::flush_target`] return instead of resting when a pause is wanted: for when
    /// the guest is frozen and must not be kept so.
    pub fn set_leave_on_pause(&mut self, on: bool) {
        self.leave_on_pause = on;
    }

    /// Copies until the policy says [`Next::Done`] or, with [`Engine::set_leave_on_pause`], a pause is wanted (then
    /// nothing is in flight), or an error is to be reported.
    pub async fn run(&mut self) -> Result<()> {
        // an earlier run may have been given up while it rested
        self.shared.resting.set(false);
        loop {
            // made before the looks below, so that nothing that happens after them is missed
            let shared = self.shared.clone();
            let control = self.control.clone();
            let (woken, changed) = (shared.work.wake.wait(), control.changed().wait());
            let now = shared.work.env.now();
            shared.work.meter.tick(now);
            while let Some(ended) = self.outcomes.try_pop() {
                self.take_in(ended, now);
            }
            shared.work.notice_losses();
            let failed = shared.work.failure.borrow_mut().take();
            if let Some(error) = failed {
                self.settle_soon().await;
                // further failures of the same round: the first one is what is reported
                shared.work.failure.take();
                return Err(error);
            }
            if control.pause_wanted() {
                self.settle_soon().await;
                if self.leave_on_pause {
                    return Ok(());
                }
                control.park().await;
                self.retry = None;
                continue;
            }
            if self.is_cut_off() {
                self.settle_soon().await;
                if self.leave_on_pause {
                    return Ok(());
                }
                self.wait_for_link().await?;
                continue;
            }
            self.window.set_speed(control.speed(), now);
            self.flush_ahead();
            let standing = self.standing(now);
            if shared.policy.pass_over(standing) == Next::Done {
                if !planted(Bug::ReadyInFlight) {
                    self.settle().await;
                }
                if shared.work.failure.borrow().is_some() || control.pause_wanted() || self.is_cut_off() {
                    continue;
                }
                return Ok(());
            }
            let wait_until = match self.start(now) {
                Ok(()) => {
                    shared.work.env.yield_now().await;
                    continue;
                }
                Err(until) => until,
            };
            control.set_idle(shared.work.copies.get() == 0 && shared.work.checks() == 0);
            let nap = wait_until.map_or(LOOK_AROUND, |t| t.saturating_sub(now)).min(LOOK_AROUND);
            let timer = shared.work.env.sleep(nap);
            let outcomes = self.outcomes.clone();
            let ended = first_of(async { outcomes.pop().await }, woken, changed, timer).await;
            control.set_idle(false);
            if let Some(ended) = ended {
                self.take_in(ended, self.shared.work.env.now());
            }
        }
    }

    /// Whether a link that is waited for is down, or has been lost and its loss not told.
    fn is_cut_off(&self) -> bool {
        self.shared.links.as_ref().is_some_and(|l| l.trouble().is_some())
    }

    /// An error that is nothing but the loss of a link: waits until that is back, and all may be tried again. Any other is
    /// given back, and so is one whose link does not come back, if that is to be reported.
    pub async fn bridge(&mut self, error: BlockError) -> Result<()> {
        let side = |side| self.shared.links.as_ref().is_some_and(|l| l.explain(side, &error));
        if !side(Side::Target) && !side(Side::Source) {
            return Err(error);
        }
        while self.is_cut_off() {
            self.wait_for_link().await?;
            if self.control.pause_wanted() {
                self.control.park().await;
            }
        }
        // lost and back in no time: not again and again without a pause
        self.shared.work.env.sleep(RETRY_FIRST).await;
        Ok(())
    }

    /// A link is down: tells so, and waits until it is back, a pause is wanted, or it is time to give up.
    async fn wait_for_link(&mut self) -> Result<()> {
        let Some(links) = self.shared.links.clone() else { return Ok(()) };
        let Some((side, why)) = links.trouble() else { return Ok(()) };
        let (work, control) = (self.shared.work.clone(), self.control.clone());
        if links.begin(side, why.clone(), work.done()) {
            control.link_lost(side, &why);
        }
        control.set_idle(true);
        let ended = {
            let paused = async {
                loop {
                    let changed = control.changed().wait();
                    if control.pause_wanted() {
                        return;
                    }
                    changed.await;
                }
            };
            race(links.wait(side, &self.shared.target), paused).await
        };
        control.set_idle(false);
        match ended {
            None => Ok(()),
            Some(Ok(())) => {
                work.notice_losses();
                let total = work.copied_again();
                let again = total - std::mem::replace(&mut self.told_again, total);
                control.link_back(side, links.end(Some(work.done())), again);
                Ok(())
            }
            Some(Err(why)) => {
                links.end(None);
                match control.link_given_up(side, &why) {
                    Action::Report => Err(why),
                    Action::Stop | Action::Ignore => Ok(()),
                }
            }
        }
    }

    /// Where the target is behind links: has it flush what it has taken, while the copy goes on.
    fn flush_ahead(&mut self) {
        let shared = &self.shared;
        let Some(doubt) = shared.work.doubt().filter(|_| !shared.flushing.get()) else { return };
        let unflushed = doubt.unflushed();
        let due = if shared.policy.discard_source() {
            unflushed >= RELEASE_EVERY || (unflushed > 0 && shared.work.urged.take())
        } else {
            shared.links.is_some() && unflushed >= FLUSH_EVERY
        };
        if due {
            let task = FlushTask::new(shared.clone(), self.outcomes.clone());
            self.tasks.retain(|t| !t.is_done());
            self.tasks.push(shared.work.env.spawn("copy flush", task.run()));
        }
    }

    /// Whether as much as may be in doubt is, and the flush that ends that is under way.
    fn is_full_of_doubt(&self) -> bool {
        let limit = if self.shared.policy.discard_source() { RELEASE_EVERY } else { FLUSH_EVERY };
        let doubt = self.shared.work.doubt().filter(|_| self.shared.flushing.get());
        doubt.is_some_and(|d| d.unflushed() >= limit)
    }

    /// Where things stand.
    fn standing(&self, now: Duration) -> Standing {
        let work = &self.shared.work;
        let dirty = work.dirty_bytes();
        let proof = work.proof();
        let idle = (work.copies.get() == 0 && work.healing.get() == 0) || planted(Bug::ReadyInFlight);
        Standing {
            dirty,
            copying: work.copying.get(),
            clean: dirty == 0 && idle && self.window.not_before(now).is_none(),
            stale: proof.as_ref().map_or(0, |p| p.stale_bytes()),
            proven: proof.is_none_or(|p| p.is_settled()),
        }
    }

    /// Starts one piece; `Err` says that there is nothing to start, perhaps until a time.
    fn start(&mut self, now: Duration) -> Result<(), Option<Duration>> {
        let work = self.shared.work.clone();
        if let Some((until, _)) = self.retry
            && until > now
        {
            return Err(Some(until));
        }
        if let Some(until) = self.window.not_before(now) {
            return Err(Some(until));
        }
        if self.hints_of != work.zeroed.get() {
            // a guest made zeroes since: what was data may be none
            self.hints.clear();
            self.hints_of = work.zeroed.get();
        }
        if self.is_full_of_doubt() {
            return Err(None);
        }
        self.look_at_guest();
        let active = work.guest_active();
        let (checks, checking) = work.proof().map_or((0, 0), |p| (p.checks.get(), p.checking.get()));
        let few = match () {
            () if checks > 0 && (active || work.copies.get() == 0) => Some(MAX_CHECKS),
            () if active => Some(MAX_IN_FLIGHT_GUEST),
            () => None,
        };
        if !self.window.has_room(work.copies.get() + checks, work.copying.get() + checking, few) {
            return Err(None);
        }
        let compares = work.proof().filter(|_| self.shared.policy.compares());
        if let Some(proof) = &compares
            && std::mem::take(&mut self.checks.turn)
            && self.start_check(proof, now, active).is_ok()
        {
            return Ok(());
        }
        self.checks.turn = true;
        if work.saving.get() > 0 && work.copies.get() >= COPIES_BESIDE_SAVING {
            // those who copy for a guest bring the same bytes to the same target, and wake us when they have
            return Err(None);
        }
        if work.is_held_up() {
            return compares.map_or(Err(None), |p| self.start_check(&p, now, active));
        }
        let dirty = work.dirty_bytes();
        let urgent = work.urgent.take();
        if let Some(urgent) = urgent {
            self.cursor = urgent;
        }
        let short = self.window.piece(dirty, active);
        // somebody waits for what is urgent
        let hurried = active
            && urgent.is_none()
            && self.shared.offload.get()
            && self.shared.beside.get() < MAX_BESIDE_GUEST
            && self.shared.policy.hurries();
        let most = match hurried {
            true => self.window.piece(dirty, false).min(OFFLOAD_LEAST).max(short),
            false => short,
        };
        if self.ask_ahead(dirty, most) && urgent.is_none() {
            return Err(None);
        }
        let (at, waits) = match self.find(most) {
            Found::Nothing => return compares.map_or(Err(None), |p| self.start_check(&p, now, active)),
            Found::Piece(at) => (at, false),
            Found::Contended(at) => (at, true),
        };
        let hurried = hurried && self.data_ahead(at);
        let at = match most > short && !hurried && self.zero_ahead(at.start).is_none() {
            true => at.split_at(short).0,
            false => at,
        };
        // far from in sync pieces are as large as they may be, which is one granule if a guest is active
        let far = dirty >= 16 * MAX_PIECE;
        let bulk = !waits && (at.len > work.granularity() || far);
        let lock = work.locks.request(at, Owner::Copy { bulk });
        self.window.pay(at.len.min(most), now);
        // While a guest is active, short copies in turn with its requests are done sooner than those of a helper thread
        // that has to get a processor first, and hold the guest up no longer. But where its requests cost more until all is copied,
        // one such thread beside them gets there in less than half the time.
        let data = (!active || hurried || self.shared.shares()) && self.data_ahead(at);
        let beside = hurried.then(|| Beside::new(&self.shared));
        let task = PieceTask::new(self.shared.clone(), at, data, beside, lock, self.outcomes.clone());
        self.tasks.retain(|t| !t.is_done());
        self.tasks.push(work.env.spawn("copy", task.run()));
        self.cursor = at.end();
        work.frontier.set(work.frontier.get().max(at.end()));
        Ok(())
    }

    /// Starts to compare one piece; `Err` as for [`Engine::start`].
    fn start_check(
        &mut self,
        proof: &Rc<Proof>,
        now: Duration,
        active: bool,
    ) -> Result<(), Option<Duration>> {
        if self.checks.not_before > now {
            return Err(Some(self.checks.not_before));
        }
        let work = self.shared.work.clone();
        let whole = work.len();
        let next = |from: u64| proof.stale.borrow().next_dirty(from);
        let Some(from) = next(self.checks.cursor).or_else(|| next(0)) else { return Err(None) };
        if from < self.checks.cursor {
            // a new pass: what was zero may not be
            (self.checks.known_to, self.checks.cursor) = (0, 0);
            self.checks.zeroes.clear();
        }
        if from >= self.checks.known_to && proof.stale_bytes() > HINT_FIRST {
            if !self.checks.asking {
                self.checks.asking = true;
                let ask = Span::between(from, whole.min(from + HINT_MOST.min(MAX_ZERO_CHECK)));
                let (shared, outcomes, unit) = (self.shared.clone(), self.outcomes.clone(), proof.unit());
                let recording = proof.is_recording();
                self.tasks.push(work.env.spawn("compare hint", async move {
                    let first = if recording { &shared.target } else { &shared.source };
                    let zeroes = zeroes_ahead(first, &shared.target, ask, unit, whole).await;
                    outcomes.push(Ended { outcome: Outcome::Zeroes(ask, zeroes), took: Duration::ZERO });
                }));
            }
            return Err(None);
        }
        let most = if active { self.window.guest_piece() } else { MAX_PIECE }.max(proof.unit());
        let at = match self.find_check(proof, most) {
            Found::Nothing => return Err(None),
            Found::Piece(at) | Found::Contended(at) => at,
        };
        if at.len > MAX_PIECE {
            // if that was not true any more, what is left of it is read
            self.checks.zeroes.retain(|z| !z.overlaps(&at));
        }
        self.window.pay(at.len.min(MAX_PIECE), now);
        let lock = work.locks.request(at, Owner::Copy { bulk: false });
        let task = CheckTask::new(self.shared.clone(), proof.clone(), at, lock, self.outcomes.clone());
        self.tasks.retain(|t| !t.is_done());
        self.tasks.push(work.env.spawn("compare", task.run()));
        self.checks.cursor = at.end();
        Ok(())
    }

    /// The next piece to compare that is clean and that nobody has locked.
    fn find_check(&self, proof: &Proof, most: u64) -> Found {
        let work = &self.shared.work;
        let (stale, dirty, unit) = (proof.stale.borrow(), work.dirty.borrow(), proof.unit());
        let len = stale.len();
        let whole = |at: u64| at & !(unit - 1);
        let mut contended = None;
        let mut skips = 0;
        for part in
            [Span::between(self.checks.cursor.min(len), len), Span::new(0, self.checks.cursor.min(len))]
        {
            let mut from = part.start;
            while let Some(start) = stale.next_dirty(from).map(whole)
                && start < part.end()
                && skips <= MAX_SKIPS
            {
                skips += 1;
                let zero = self
                    .checks
                    .zeroes
                    .iter()
                    .find(|z| z.contains_offset(start))
                    .map_or(0, |z| z.end() - start);
                let most = most.max(zero.min(MAX_ZERO_CHECK));
                let Some(mut at) = stale.next_area(Span::between(start, len), most) else { break };
                if zero == 0
                    && let Some(z) = self.checks.zeroes.iter().find(|z| at.contains_offset(z.start))
                {
                    at = Span::between(at.start, z.start);
                }
                if let Some(changed) = dirty.next_area(at, 0) {
                    let before = Span::between(at.start, whole(changed.start).max(at.start));
                    if before.is_empty() {
                        from = changed.end().next_multiple_of(unit).max(start + unit);
                        continue;
                    }
                    at = before;
                }
                let Some((other, owner)) = work.locks.conflict(&at) else { return Found::Piece(at) };
                let free = Span::between(at.start, whole(other.start).max(at.start));
                if !free.is_empty() {
                    return Found::Piece(free);
                }
                if owner == Owner::Guest && contended.is_none() {
                    contended = Some(Span::new(at.start, at.len.min(unit)));
                }
                from = other.end().next_multiple_of(unit).max(start + unit);
            }
        }
        contended.filter(|at| !work.locks.copy_overlaps(at)).map_or(Found::Nothing, Found::Contended)
    }

    fn look_at_guest(&mut self) {
        let Some((node, seen)) = &mut self.watched else { return };
        let counters = node.counters();
        let now = counters.reads + counters.writes;
        let requests = now - std::mem::replace(seen, now);
        if requests > 0 {
            self.shared.work.guest_seen(requests);
        }
    }

    /// The next dirty piece after the cursor that nobody has locked.
    fn find(&self, most: u64) -> Found {
        let work = &self.shared.work;
        let dirty = work.dirty.borrow();
        let (len, g) = (dirty.len(), dirty.granularity());
        let mut contended = None;
        let mut skips = 0;
        for part in [Span::between(self.cursor.min(len), len), Span::new(0, self.cursor.min(len))] {
            let mut from = part.start;
            while let Some(start) = dirty.next_dirty(from)
                && start < part.end()
            {
                let start = start & !(g - 1);
                let most = self.zero_ahead(start).map_or(most, |run| run.max(most));
                let Some(at) = dirty.next_area(Span::between(start, len), most) else { break };
                let Some((other, owner)) = work.locks.conflict(&at) else { return Found::Piece(at) };
                let free = Span::between(at.start, other.start & !(g - 1));
                if !free.is_empty() {
                    return Found::Piece(free);
                }
                if owner == Owner::Guest && contended.is_none() {
                    contended = Some(Span::new(at.start, at.len.min(g)));
                }
                skips += 1;
                if skips > MAX_SKIPS {
                    break;
                }
                from = other.end().next_multiple_of(g).max(at.start + g);
            }
        }
        // Waiting in line is for when there is nothing else: then the copy gets its turn among the guest's requests.
        contended.filter(|at| !work.locks.copy_overlaps(at)).map_or(Found::Nothing, Found::Contended)
    }

    /// How far the source is known to have been zero from `at` on, in whole granules: no further than what may be zeroed in one
    /// piece, but where the target is zero already and nothing will have to be done.
    fn zero_ahead(&self, at: u64) -> Option<u64> {
        let e = self.hints.iter().find(|e| e.span.contains_offset(at))?;
        if e.kind != Kind::Zero {
            return None;
        }
        let whole = |bytes: u64| bytes & !(self.shared.work.granularity() - 1);
        let mut run = whole(e.span.end() - at);
        if run > MAX_ZERO_PIECE && !self.shared.work.target_is_zero(Span::new(at, run)) {
            run = whole(MAX_ZERO_PIECE);
        }
        (run > 0).then_some(run)
    }

    /// Whether the source is known to hold data in all of `at`, and that is enough to leave it to the host. If it no longer
    /// holds data, zeroes are copied as data.
    fn data_ahead(&self, at: Span) -> bool {
        at.len >= OFFLOAD_LEAST
            && (self.shared.work.dirty_is_data()
                || self.hints.iter().any(|e| e.kind == Kind::Data && e.span.contains(&at)))
    }

    /// Far from in sync, asks what the source holds around the cursor. Whether nothing is known there yet and the answer is to
    /// be waited for.
    fn ask_ahead(&mut self, dirty: u64, most: u64) -> bool {
        let work = &self.shared.work;
        if dirty < 8 * most.max(MAX_PIECE) || work.dirty_is_data() {
            return false;
        }
        let len = work.len();
        let Some(at) = work.dirty.borrow().next_dirty(self.cursor % len.max(1)) else { return false };
        let mut known = at;
        for e in &self.hints {
            if e.span.contains_offset(known) {
                known = e.span.end();
            }
        }
        if !self.hinting && known < len && known - at < self.hint_span / 2 {
            self.hinting = true;
            let ask = Span::between(known, len.min(known + self.hint_span));
            self.hint_span = (self.hint_span * 4).min(HINT_MOST);
            let (source, outcomes) = (self.shared.source.clone(), self.outcomes.clone());
            self.tasks.push(work.env.spawn("copy hint", async move {
                let found = status(&source, ask).await.unwrap_or_default();
                outcomes.push(Ended { outcome: Outcome::Hint(ask, found), took: Duration::ZERO });
            }));
        }
        known == at && self.hinting
    }

    fn take_in(&mut self, ended: Ended, now: Duration) {
        match ended.outcome {
            Outcome::Hint(asked, found) => {
                self.hinting = false;
                let cursor = self.cursor;
                self.hints.retain(|e| e.span.end() > cursor);
                if found.is_empty() {
                    // nobody knows: looked at piece by piece, and not asked again
                    self.hints.push(Extent::new(asked, Kind::Unallocated));
                }
                self.hints.extend(found);
            }
            Outcome::GaveWay | Outcome::Flushed(Ok(())) => {}
            Outcome::Flushed(Err(error)) => match self.control.failed(Side::Target, &error) {
                Action::Report => {
                    self.shared.work.failure.borrow_mut().get_or_insert(error);
                }
                Action::Stop => {}
                Action::Ignore => self.retry_later(now),
            },
            Outcome::Unclear => self.checks.not_before = now + UNCLEAR_WAIT,
            Outcome::Zeroes(asked, zeroes) => {
                self.checks.asking = false;
                self.checks.zeroes = zeroes;
                self.checks.known_to = asked.end();
            }
            Outcome::Copied => {
                self.window.took(ended.took);
                self.retry = None;
            }
            Outcome::Failed(side, error, at) => match self.control.failed(side, &error) {
                Action::Report => {
                    self.shared.work.failure.borrow_mut().get_or_insert(error);
                }
                Action::Stop => {}
                Action::Ignore if self.shared.policy.leaves_out(at, &error) => {
                    self.shared.work.dirty.borrow_mut().clear(at);
                }
                Action::Ignore => self.retry_later(now),
            },
        }
    }

    fn retry_later(&mut self, now: Duration) {
        let wait = self.retry.map_or(RETRY_FIRST, |(_, w)| (w * 2).min(RETRY_MAX));
        self.retry = Some((now + wait, wait));
    }

    /// Waits until no copy is in flight; those that have not begun do not begin. One error is told once, not again by each
    /// that was about to meet it, too.
    async fn settle_soon(&mut self) {
        self.shared.resting.set(true);
        self.settle().await;
        self.shared.resting.set(false);
    }

    /// Waits until no copy is in flight.
    async fn settle(&mut self) {
        while self.shared.work.copies.get() > 0 || self.shared.work.checks() > 0 {
            let Some(ended) = self.outcomes.pop().await else { return };
            self.take_in(ended, self.shared.work.env.now());
        }
        while let Some(ended) = self.outcomes.try_pop() {
            self.take_in(ended, self.shared.work.env.now());
        }
    }

    /// Flushes the target, under the error policy: tries again after a stop or under `ignore`. Whether it is flushed, with
    /// all that was copied before; `false`: the engine has to [`run`](Engine::run) again.
    pub async fn flush_target(&mut self) -> Result<bool> {
        let shared = self.shared.clone();
        let certain = Cell::new(true);
        let flushed = self.on_target(async || {
            certain.set(shared.flush().await?);
            Ok(())
        });
        Ok(flushed.await? && certain.get())
    }

    /// `false`: it is not done, since a pause is wanted (and the guest frozen) or a link was lost that is waited for.
    async fn on_target(&mut self, mut request: impl AsyncFnMut() -> Result<()>) -> Result<bool> {
        let mut wait = RETRY_FIRST;
        loop {
            let Err(error) = request().await else { return Ok(true) };
            if self.shared.links.as_ref().is_some_and(|l| l.explain(Side::Target, &error)) {
                self.shared.work.env.sleep(RETRY_FIRST).await;
                return Ok(false);
            }
            match self.control.failed(Side::Target, &error) {
                Action::Report => return Err(error),
                Action::Stop => {}
                Action::Ignore => {
                    self.shared.work.env.sleep(wait).await;
                    wait = (wait * 2).min(RETRY_MAX);
                }
            }
            if self.control.pause_wanted() {
                if self.leave_on_pause {
                    return Ok(false);
                }
                self.control.park().await;
            }
        }
    }

    /// Makes `at` of the target read as zero, under the error policy.
    pub async fn zero_target(&mut self, at: Span) -> Result<()> {
        let flags = ReqFlags { may_unmap: true, ..ReqFlags::NONE };
        let shared = self.shared.clone();
        self.on_target(|| shared.target.zero(at, flags)).await.map(|_| ())
    }

    /// What it copies between, and what is known of the work.
    pub fn work(&self) -> &Rc<Work> {
        &self.shared.work
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.tasks.iter().for_each(TaskHandle::cancel);
    }
}

/// The outcome if it comes first; `None` when one of the others does.
async fn first_of(
    outcome: impl Future<Output = Option<Ended>>,
    a: impl Future<Output = ()>,
    b: impl Future<Output = ()>,
    timer: impl Future<Output = ()>,
) -> Option<Ended> {
    let mut outcome = pin!(outcome);
    let (a, b, timer) = (pin!(a), pin!(b), pin!(timer));
    let mut others: [Pin<&mut dyn Future<Output = ()>>; 3] = [a, b, timer];
    std::future::poll_fn(move |cx| {
        if let Poll::Ready(o) = outcome.as_mut().poll(cx) {
            return Poll::Ready(o);
        }
        let any = others.iter_mut().any(|f| f.as_mut().poll(cx).is_ready());
        if any { Poll::Ready(None) } else { Poll::Pending }
    })
    .await
}
