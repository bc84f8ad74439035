//! `blkdebug`: lets requests fail by rules, and lets a disk look as if its limits were tighter.
//!
//! What can happen: a rule makes any request fail with any error, at once or after others ran. What must stay true: a
//! request that is to fail changes nothing below; one that no rule meets does exactly what the child does.

use super::blkdebug_config;
use super::blkdebug_rules::{IoType, Rule, Rules};
use crate::filters::{Given, filter_basics, filter_passes, inside, read_past_end};
use block::{BlockError, Data, Extent, Io, Kind, Limits, ReqFlags, Result, Span};
use env::{Env, OpenMode};
use graph::{DebugEvent, Demand, Edge, Node, NodeDetails, Perms};
use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

pub use blkdebug_config::offset;

/// Largest configuration file in bytes: a thousand times what anybody wrote.
const MAX_CONFIG: u64 = 1 << 20;

/// Largest alignment and request: what a 32-bit signed number of bytes can say.
const MAX_SIZE: u64 = i32::MAX as u64;

/// Options of `blkdebug`. Sizes in bytes; 0: none.
#[derive(Clone, Debug, Default)]
pub struct BlkdebugOptions {
    /// A file with more rules.
    pub config: Option<String>,
    /// Requests are aligned to this (power of two).
    pub align: u64,
    /// Longest read or write.
    pub max_transfer: u64,
    /// Requests for zeroes are cut at multiples of this.
    pub opt_write_zero: u64,
    /// Longest request for zeroes.
    pub max_write_zero: u64,
    /// Discards are cut at multiples of this.
    pub opt_discard: u64,
    /// Longest discard.
    pub max_discard: u64,
    /// The rules, those of errors first.
    pub rules: Vec<Rule>,
    /// Taken of the child besides what parents need.
    pub take: Perms,
    /// Not shared with other users of the child, whatever parents share.
    pub unshare: Perms,
    /// As the client said it.
    pub given: Given,
}

/// The filter.
pub struct Blkdebug {
    image: Rc<Edge>,
    options: BlkdebugOptions,
    rules: RefCell<Rules>,
    /// Something was written since the last flush: others do not count as flushes for the rules.
    written: Cell<bool>,
}

impl Blkdebug {
    /// A filter in front of the child of `image` (an edge of role `Filtered`, named `image`). Fails for options that
    /// contradict each other and for a configuration file that cannot be read.
    pub async fn open(env: &Env, image: Rc<Edge>, options: BlkdebugOptions) -> Result<Rc<Blkdebug>> {
        let mut rules = match &options.config {
            Some(path) => blkdebug_config::parse(&read_config(env, path).await?)?,
            None => Vec::new(),
        };
        rules.extend(&options.rules);
        check_limits(&options, image.limits().request_alignment)?;
        Ok(Rc::new(Blkdebug {
            image,
            options,
            rules: RefCell::new(Rules::new(&rules)),
            written: Cell::new(false),
        }))
    }

    /// Fails if a rule says so.
    async fn check(&self, io: IoType, at: Span) -> Result<()> {
        let Some(rule) = self.rules.borrow_mut().check(io, at) else { return Ok(()) };
        if !rule.immediately {
            env::sync::yield_now().await;
        }
        Err(BlockError::from_errno(rule.errno))
    }

    fn tell(&self, event: DebugEvent) {
        self.rules.borrow_mut().event(event);
    }

    /// A write has ended, one way or the other.
    fn wrote(&self) {
        self.written.set(true);
        self.tell(DebugEvent::PwritevDone);
    }

    async fn write_zeroes(&self, at: Span, flags: ReqFlags) -> Result<()> {
        self.tell(DebugEvent::PwritevZero);
        let mut outcome = Ok(());
        for now in pieces(at, self.options.opt_write_zero, self.options.max_write_zero) {
            outcome = self.check(IoType::WriteZeroes, now).await;
            if outcome.is_ok() {
                outcome = self.image.zero(inside(&self.image, now), flags).await;
            }
            if outcome.is_err() {
                break;
            }
        }
        self.wrote();
        outcome
    }
}

async fn read_config(env: &Env, path: &str) -> Result<String> {
    let refused = |e: BlockError| e.context("Could not read blkdebug config file");
    let file = env.open(Path::new(path), OpenMode::default()).await.map_err(refused)?;
    let len = file.len_hint();
    if len > MAX_CONFIG {
        return Err(refused(BlockError::from_errno(BlockError::EFBIG)));
    }
    let bytes = file.read(Span::new(0, len)).await.map_err(refused)?.to_vec();
    String::from_utf8(bytes).map_err(|_| refused(BlockError::invalid("it is not UTF-8")))
}

fn check_limits(o: &BlkdebugOptions, below: u64) -> Result<()> {
    let refuse = |what: &str, size: u64| {
        Err(BlockError::invalid(format!("Cannot meet constraints with {what} {size}")))
    };
    if o.align > 0 && (o.align >= MAX_SIZE || !o.align.is_power_of_two()) {
        return refuse("align", o.align);
    }
    let align = o.align.max(below);
    let sizes = [
        ("max-transfer", o.max_transfer, align),
        ("opt-write-zero", o.opt_write_zero, align),
        ("max-write-zero", o.max_write_zero, align.max(o.opt_write_zero)),
        ("opt-discard", o.opt_discard, align),
        ("max-discard", o.max_discard, align.max(o.opt_discard)),
    ];
    match sizes.iter().find(|(_, size, unit)| *size >= MAX_SIZE || !size.is_multiple_of(*unit)) {
        Some((what, size, _)) => refuse(what, *size),
        None => Ok(()),
    }
}

/// Cuts a request at multiples of `unit` where it is not aligned, and into pieces of at most `max`; 0 is no limit.
fn pieces(at: Span, unit: u64, max: u64) -> impl Iterator<Item = Span> {
    let mut left = at;
    std::iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let to_unit = match unit {
            0 => left.len,
            u if !left.start.is_multiple_of(u) => u - left.start % u,
            u if left.len > u => left.len - left.end() % u,
            _ => left.len,
        };
        let (now, rest) = left.split_at(if max == 0 { to_unit } else { to_unit.min(max) });
        left = rest;
        Some(now)
    })
}

impl Node for Blkdebug {
    filter_basics!(image);
    filter_passes!(image: resize, close);

    fn driver(&self) -> &'static str {
        "blkdebug"
    }
    fn limits(&self) -> Limits {
        let below = self.image.limits();
        let max_transfer =
            [self.options.max_transfer, below.max_transfer].into_iter().filter(|m| *m > 0).min();
        Limits {
            request_alignment: self.options.align.max(below.request_alignment),
            max_transfer: max_transfer.unwrap_or(0),
            ..below
        }
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        let needs = above.needs.with(self.options.take);
        Demand { needs, shares: above.shares.without(self.options.unshare) }
    }
    fn debug_event(&self, event: DebugEvent) {
        self.tell(event);
    }
    fn hears_events(&self) -> bool {
        true
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.check(IoType::Read, at).await?;
            read_past_end(&self.image, at).await
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(async move {
            self.tell(DebugEvent::Pwritev);
            let mut outcome = self.check(IoType::Write, at).await;
            if outcome.is_ok() {
                let there = inside(&self.image, at);
                outcome = self.image.write(there.start, data.slice(0, there.len as usize), flags).await;
            }
            self.wrote();
            outcome
        })
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.write_zeroes(at, flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            for now in pieces(at, self.options.opt_discard, self.options.max_discard) {
                self.check(IoType::Discard, now).await?;
                self.image.discard(inside(&self.image, now)).await?;
                self.written.set(true);
            }
            Ok(())
        })
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(async move {
            self.check(IoType::BlockStatus, at).await?;
            Ok(vec![Extent::new(at, Kind::Unallocated)])
        })
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            if self.written.get() {
                self.check(IoType::Flush, Span::new(0, 0)).await?;
            }
            self.written.set(false);
            self.image.flush().await
        })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let below = self.image.child().node().details().await?;
            let name = &below.filename;
            let filename = if self.options.given.any_but("config") || name.starts_with("json:") {
                self.options.given.filename(self.driver(), &[&self.image]).await?
            } else {
                format!("blkdebug:{}:{name}", self.options.config.as_deref().unwrap_or_default())
            };
            Ok(NodeDetails { filename, cluster_size: below.cluster_size, ..NodeDetails::default() })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_cut_where_the_limits_say() {
        let cut = |at: Span, unit, max| pieces(at, unit, max).map(|s| (s.start, s.len)).collect::<Vec<_>>();
        assert_eq!(cut(Span::new(10, 100), 0, 0), [(10, 100)]);
        assert_eq!(cut(Span::new(10, 100), 0, 60), [(10, 60), (70, 40)]);
        assert_eq!(cut(Span::new(10, 100), 32, 0), [(10, 22), (32, 64), (96, 14)]);
        assert_eq!(cut(Span::new(10, 100), 32, 32), [(10, 22), (32, 32), (64, 32), (96, 14)]);
        assert_eq!(cut(Span::new(32, 8), 32, 32), [(32, 8)]);
        assert_eq!(cut(Span::new(32, 0), 32, 32), []);
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        let of = |align, max_transfer, opt_discard, max_discard| {
            let o = BlkdebugOptions { align, max_transfer, opt_discard, max_discard, ..Default::default() };
            check_limits(&o, 1).map_err(|e| e.message().to_owned())
        };
        assert_eq!(of(512, 1024, 4096, 8192), Ok(()));
        let refused = |what: &str| Err(format!("Cannot meet constraints with {what}"));
        assert_eq!(of(100, 0, 0, 0), refused("align 100"));
        assert_eq!(of(4096, 1000, 0, 0), refused("max-transfer 1000"));
        assert_eq!(of(512, 0, 1000, 0), refused("opt-discard 1000"));
        assert_eq!(of(512, 0, 4096, 5120), refused("max-discard 5120"));
    }
}
