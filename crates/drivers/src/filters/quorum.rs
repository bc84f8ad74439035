//! `quorum`: one disk kept in several places; what is read is what enough of them agree on.
//!
//! What can happen: any child fails or holds something else than the others. What must stay true: a write is done when at
//! least the threshold of children has it, and all were asked; a read gives what at least the threshold of children holds,
//! or what the first child that can be read holds (`fifo`); nobody compares children while a write to the same bytes is
//! between them (reads and writes of one range exclude each other); whoever fails or lies is reported.

use super::Given;
use super::basics::description;
use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Result, Span};
use env::sync::RangeLocks;
use graph::{Demand, Edge, Node, NodeDetails, Perms};
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

/// Most children: far above any use; a read costs one buffer for each.
pub const MAX_CHILDREN: usize = 32;

/// Which child is read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReadPattern {
    /// All; they vote.
    #[default]
    Quorum,
    /// The first that can be read.
    Fifo,
}

/// Options of `quorum`.
#[derive(Clone, Debug, Default)]
pub struct QuorumOptions {
    /// How many children must agree.
    pub threshold: usize,
    /// A read that two children answer differently fails whatever the threshold.
    pub blkverify: bool,
    /// Children that were outvoted are put right.
    pub rewrite: bool,
    /// Which child is read.
    pub pattern: ReadPattern,
    /// As the client said it.
    pub given: Given,
}

/// What a quorum reports.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum QuorumEvent {
    /// A child failed, or (without an error) holds something else than the winners.
    Bad {
        /// `read`, `write` or `flush`.
        operation: &'static str,
        /// The child.
        node: String,
        /// Why it failed.
        error: Option<String>,
        /// Where; empty for a flush.
        at: Span,
    },
    /// No threshold of children agreed or took a write.
    Failure {
        /// The quorum.
        node: String,
        /// Where.
        at: Span,
    },
}

/// Told of events.
pub type QuorumHook = Rc<dyn Fn(QuorumEvent)>;

/// The node.
pub struct Quorum {
    name: String,
    children: RefCell<Rc<[Rc<Edge>]>>,
    /// Number of the next child.
    next: Cell<usize>,
    options: QuorumOptions,
    hook: QuorumHook,
    ranges: RangeLocks,
}

impl QuorumOptions {
    /// Fails if the options contradict each other.
    pub fn check(&self, children: usize) -> Result<()> {
        let refuse = |what: &str| Err(BlockError::invalid(what));
        if children == 0 {
            return refuse("Number of provided children must be 1 or more");
        }
        if children > MAX_CHILDREN {
            return Err(BlockError::invalid(format!("a quorum has at most {MAX_CHILDREN} children")));
        }
        if self.threshold < 1 {
            return refuse("Parameter 'vote-threshold' expects a value >= 1");
        }
        if self.threshold > children {
            return refuse("threshold may not exceed children count");
        }
        if self.pattern == ReadPattern::Fifo {
            return Ok(());
        }
        if self.blkverify && (children != 2 || self.threshold != 2) {
            return refuse(
                "blkverify=on can only be set if there are exactly two files and vote-threshold is 2",
            );
        }
        if self.blkverify && self.rewrite {
            return refuse("rewrite-corrupted=on cannot be used with blkverify=on");
        }
        Ok(())
    }
}

/// Children of different lengths.
fn unequal() -> BlockError {
    BlockError::new(ErrorKind::Io, "Could not refresh total sector count: Input/output error")
}

/// Results of all, in their order; they run side by side.
pub(crate) async fn all<'a, T>(mut running: Vec<Io<'a, T>>) -> Vec<Result<T>> {
    let mut done: Vec<Option<Result<T>>> = running.iter().map(|_| None).collect();
    poll_fn(|cx| {
        let mut waiting = false;
        for (task, slot) in running.iter_mut().zip(&mut done).filter(|(_, slot)| slot.is_none()) {
            match task.as_mut().poll(cx) {
                Poll::Ready(result) => *slot = Some(result),
                Poll::Pending => waiting = true,
            }
        }
        if waiting { Poll::Pending } else { Poll::Ready(()) }
    })
    .await;
    done.into_iter().flatten().collect()
}

/// Children by what they hold, the first to hold it first: (what, who).
fn versions(answers: &[Result<Data>]) -> Vec<(&Data, Vec<usize>)> {
    let mut found: Vec<(&Data, Vec<usize>)> = Vec::new();
    for (child, data) in answers.iter().enumerate().filter_map(|(i, a)| Some((i, a.as_ref().ok()?))) {
        match found.iter_mut().find(|(held, _)| *held == data) {
            Some((_, holders)) => holders.push(child),
            None => found.push((data, vec![child])),
        }
    }
    found
}

/// The errno that most failures have, the first of several such.
fn common_error<T>(answers: &[Result<T>]) -> BlockError {
    let errors: Vec<&BlockError> = answers.iter().filter_map(|a| a.as_ref().err()).collect();
    let votes = |e: &BlockError| errors.iter().filter(|other| other.errno() == e.errno()).count();
    let most = errors.iter().rev().max_by_key(|e| votes(e));
    most.map_or_else(|| BlockError::from_errno(BlockError::EIO), |e| (*e).clone())
}

impl Quorum {
    /// A quorum called `name` of the children behind `children` (edges of role `Other`, named `children.N`).
    pub fn open(
        name: &str,
        children: Vec<Rc<Edge>>,
        options: QuorumOptions,
        hook: QuorumHook,
    ) -> Result<Rc<Quorum>> {
        options.check(children.len())?;
        if children.iter().any(|c| c.len() != children[0].len()) {
            return Err(unequal());
        }
        Ok(Rc::new(Quorum {
            name: name.to_owned(),
            next: Cell::new(children.len()),
            children: RefCell::new(children.into()),
            options,
            hook,
            ranges: RangeLocks::new(),
        }))
    }

    /// The children as they are now. They change only while no request is inside.
    fn children(&self) -> Rc<[Rc<Edge>]> {
        self.children.borrow().clone()
    }

    /// What the edge to one more child, of `len` bytes, is called. Numbers go up; the last child's is used again.
    ///
    /// # Errors
    /// In `blkverify` mode, with too many children, or if the length differs from that of the others.
    pub fn next_child(&self, len: u64) -> Result<String> {
        if self.options.blkverify {
            return Err(BlockError::invalid("Cannot add a child to a quorum in blkverify mode"));
        }
        self.options.check(self.children().len() + 1)?;
        if self.len() != len {
            return Err(unequal());
        }
        Ok(format!("children.{}", self.next.get()))
    }

    /// The children without the one called `child`; `None` if there is none.
    ///
    /// # Errors
    /// If fewer than the threshold would be left.
    pub fn without(&self, child: &str) -> Result<Option<Vec<Rc<Edge>>>> {
        let children = self.children();
        if !children.iter().any(|e| e.name() == child) {
            return Ok(None);
        }
        if children.len() <= self.options.threshold {
            let threshold = self.options.threshold;
            return Err(BlockError::invalid(format!(
                "The number of children cannot be lower than the vote threshold {threshold}"
            )));
        }
        Ok(Some(children.iter().filter(|e| e.name() != child).cloned().collect()))
    }

    fn report_bad(&self, operation: &'static str, child: usize, error: Option<&BlockError>, at: Span) {
        let node = self.children()[child].child().name().to_owned();
        let error = error.map(|e| block::strerror(e.errno()));
        (self.hook)(QuorumEvent::Bad { operation, node, error, at });
    }

    /// Reports who failed; fails if fewer than the threshold did it.
    fn settle<T>(&self, operation: &'static str, answers: &[Result<T>], at: Span) -> Result<()> {
        for (child, answer) in answers.iter().enumerate() {
            if let Err(e) = answer {
                self.report_bad(operation, child, Some(e), at);
            }
        }
        if answers.iter().filter(|a| a.is_ok()).count() >= self.options.threshold {
            return Ok(());
        }
        if operation != "flush" {
            self.fail(at);
        }
        Err(common_error(answers))
    }

    fn fail(&self, at: Span) {
        (self.hook)(QuorumEvent::Failure { node: self.name.clone(), at });
    }

    async fn read_first(&self, at: Span) -> Result<Data> {
        let mut last = None;
        for (i, child) in self.children().iter().enumerate() {
            match child.read(at).await {
                Ok(data) => return Ok(data),
                Err(e) => {
                    self.report_bad("read", i, Some(&e), at);
                    last = Some(e);
                }
            }
        }
        Err(last.unwrap_or_else(|| BlockError::from_errno(BlockError::EIO)))
    }

    async fn read_vote(&self, at: Span) -> Result<Data> {
        let _lock = self.ranges.lock(at, self.options.rewrite).await;
        let children = self.children();
        let answers = all(children.iter().map(|c| Box::pin(c.read(at)) as Io<'_, Data>).collect()).await;
        self.settle("read", &answers, at)?;
        let versions = versions(&answers);
        // Of versions with equally many holders the first one's, as it was found first.
        let winner = versions.iter().rev().max_by_key(|(_, holders)| holders.len());
        let Some((data, holders)) = winner else { return Err(common_error(&answers)) };
        if versions.len() == 1 {
            return Ok((*data).clone());
        }
        if self.options.blkverify || holders.len() < self.options.threshold {
            self.fail(at);
            return Err(BlockError::new(
                ErrorKind::Io,
                format!("the children of '{}' disagree at {at}", self.name),
            ));
        }
        let outvoted: Vec<usize> = versions
            .iter()
            .filter(|(held, _)| held != data)
            .flat_map(|(_, who)| who.iter().copied())
            .collect();
        for &child in &outvoted {
            self.report_bad("read", child, None, at);
        }
        if self.options.rewrite {
            let flags = ReqFlags::NONE;
            let writes = outvoted
                .iter()
                .map(|&i| Box::pin(children[i].write(at.start, (*data).clone(), flags)) as Io<'_>);
            // The read succeeded; a child that cannot be put right is outvoted again next time.
            let _ = all(writes.collect()).await;
        }
        Ok((*data).clone())
    }

    /// Runs a write on all children.
    async fn on_all(&self, at: Span, write: impl for<'c> Fn(&'c Rc<Edge>) -> Io<'c>) -> Result<()> {
        let _lock = self.ranges.lock(at, true).await;
        let children = self.children();
        let answers = all(children.iter().map(write).collect()).await;
        self.settle("write", &answers, at)
    }
}

impl Node for Quorum {
    fn driver(&self) -> &'static str {
        "quorum"
    }
    fn len(&self) -> u64 {
        self.children.borrow()[0].len()
    }
    fn limits(&self) -> Limits {
        let children = self.children();
        let each = children.iter().map(|c| c.limits());
        each.reduce(|a, b| Limits {
            request_alignment: a.request_alignment.max(b.request_alignment),
            memory_alignment: a.memory_alignment.max(b.memory_alignment),
            cluster_size: 0,
            max_transfer: match (a.max_transfer, b.max_transfer) {
                (0, m) | (m, 0) => m,
                (a, b) => a.min(b),
            },
            efficient_zero: a.efficient_zero && b.efficient_zero,
        })
        .unwrap_or_default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        self.children().to_vec()
    }
    fn wants(&self, _: &Edge, above: Demand, writable: bool) -> Demand {
        let rewriting = if self.options.rewrite && writable { Perms::WRITE } else { Perms::NONE };
        // Others that write or resize would make the children differ.
        let shares = above.shares.common(Perms::CONSISTENT_READ.with(Perms::WRITE_UNCHANGED));
        Demand { needs: above.needs.with(rewriting), shares }
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        match self.options.pattern {
            ReadPattern::Quorum => Box::pin(self.read_vote(at)),
            ReadPattern::Fifo => Box::pin(self.read_first(at)),
        }
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move { self.on_all(at, |c| Box::pin(c.write(at.start, data.clone(), flags))).await })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move { self.on_all(at, |c| Box::pin(c.zero(at, flags))).await })
    }
    fn discard(&self, _: Span) -> Io<'_> {
        // What discarded bytes read as may differ from child to child.
        Box::pin(async { Ok(()) })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            let (mut zero, mut len) = (true, at.len);
            for child in self.children().iter() {
                if let Some(first) = child.status(at).await?.first() {
                    zero &= first.reads_zero();
                    len = len.min(first.span.len);
                }
            }
            let kind = if zero { Kind::Zero } else { Kind::Data };
            Ok(vec![Extent::new(at.split_at(len).0, kind)])
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            let children = self.children();
            let answers = all(children.iter().map(|c| Box::pin(c.flush()) as Io<'_>).collect()).await;
            self.settle("flush", &answers, Span::new(0, 0))
        })
    }
    fn set_children(&self, edges: Vec<Rc<Edge>>) {
        let number = |e: &Rc<Edge>| e.name().rsplit('.').next().and_then(|n| n.parse::<usize>().ok());
        let before = self.children.replace(edges.into());
        let now = self.children();
        let next = self.next.get();
        let has = |list: &[Rc<Edge>], n: usize| list.iter().any(|e| number(e) == Some(n));
        if has(&now, next) {
            self.next.set(next + 1);
        } else if next > 0 && has(&before, next - 1) && !has(&now, next - 1) {
            self.next.set(next - 1);
        }
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let (mut children, mut size) = (Vec::new(), Some(0));
            for edge in self.children().iter() {
                children.push(description(&edge.child()).await?);
                let below = edge.child().node().details().await?.actual_size;
                size = size.zip(below).map(|(all, one): (u64, u64)| all.saturating_add(one));
            }
            let own = self.options.given.0.iter().map(|(key, value)| format!(", \"{key}\": {value}"));
            let filename = format!(
                "json:{{\"driver\": \"quorum\", \"children\": [{}]{}}}",
                children.join(", "),
                own.collect::<String>()
            );
            Ok(NodeDetails { filename, actual_size: size, ..NodeDetails::default() })
        })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_counted_by_what_they_hold() {
        let of = |b: &[u8]| Ok(Data::copy_from(b));
        let answers = [of(b"x"), Err(BlockError::from_errno(5)), of(b"y"), of(b"y")];
        let found = versions(&answers);
        let shown: Vec<_> = found.iter().map(|(d, who)| (d.to_vec(), who.clone())).collect();
        assert_eq!(shown, [(b"x".to_vec(), vec![0]), (b"y".to_vec(), vec![2, 3])]);
    }

    #[test]
    fn the_error_that_most_have_is_the_quorums() {
        let e = |n| Err::<(), _>(BlockError::from_errno(n));
        assert_eq!(common_error(&[e(5), e(28), Ok(()), e(28)]).errno(), 28);
        assert_eq!(common_error(&[e(5), e(28)]).errno(), 5);
    }

    #[test]
    fn contradictions_are_refused() {
        let of = |threshold, children, blkverify, rewrite| {
            let o = QuorumOptions { threshold, blkverify, rewrite, ..QuorumOptions::default() };
            o.check(children).map_err(|e| e.message().to_owned())
        };
        assert_eq!(of(2, 3, false, true), Ok(()));
        assert!(of(1, 0, false, false).is_err_and(|e| e.contains("1 or more")));
        assert!(of(3, 2, false, false).is_err_and(|e| e.contains("may not exceed")));
        assert!(of(0, 2, false, false).is_err_and(|e| e.contains(">= 1")));
        assert!(of(2, 3, true, false).is_err_and(|e| e.contains("exactly two files")));
        assert!(of(2, 2, true, true).is_err_and(|e| e.contains("cannot be used with")));
    }
}
