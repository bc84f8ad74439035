//! `null-co` and `null-aio`: a disk that holds nothing. Writes vanish; reads give zeroes.
//!
//! QSD leaves the buffer of a read as it is unless `read-zeroes=on`. Here there is no old buffer to leak, so reads are
//! zeroes either way; the option decides only what block status says.

use block::{Data, Extent, Io, Kind, Limits, Prealloc, ReqFlags, Span};
use env::Env;
use graph::{Demand, Edge, Node, NodeDetails};
use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

/// How a null disk behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NullOptions {
    /// Under which of its two names it was asked for: `null-co` or `null-aio`.
    pub driver: &'static str,
    /// Bytes (default 1 GiB).
    pub size: u64,
    /// Block status says zero instead of data.
    pub read_zeroes: bool,
    /// Each request takes so long.
    pub latency: Duration,
}

impl Default for NullOptions {
    fn default() -> NullOptions {
        NullOptions { driver: "null-co", size: 1 << 30, read_zeroes: false, latency: Duration::ZERO }
    }
}

/// A null disk.
pub struct NullNode {
    env: Env,
    options: NullOptions,
    len: Cell<u64>,
}

impl NullNode {
    /// Cannot fail.
    pub fn open(env: &Env, options: NullOptions) -> Rc<NullNode> {
        Rc::new(NullNode { env: env.clone(), len: Cell::new(options.size), options })
    }

    async fn pass_time(&self) {
        if !self.options.latency.is_zero() {
            self.env.sleep(self.options.latency).await;
        }
    }

    fn after_a_while(&self) -> Io<'_> {
        Box::pin(async move {
            self.pass_time().await;
            Ok(())
        })
    }
}

impl Node for NullNode {
    fn driver(&self) -> &'static str {
        self.options.driver
    }
    fn len(&self) -> u64 {
        self.len.get()
    }
    fn limits(&self) -> Limits {
        Limits::default()
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, _: Demand, _: bool) -> Demand {
        Demand::NOTHING
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            self.pass_time().await;
            Ok(Data::zeroes(at.len as usize))
        })
    }
    fn write(&self, _: Span, _: Data, _: ReqFlags) -> Io<'_> {
        self.after_a_while()
    }
    fn zero(&self, _: Span, _: ReqFlags) -> Io<'_> {
        self.after_a_while()
    }
    fn discard(&self, _: Span) -> Io<'_> {
        self.after_a_while()
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        let kind = if self.options.read_zeroes { Kind::Zero } else { Kind::Data };
        Box::pin(async move { Ok(vec![Extent::new(at, kind)]) })
    }
    fn flush(&self) -> Io<'_> {
        self.after_a_while()
    }
    fn resize(&self, len: u64, _: Prealloc) -> Io<'_> {
        self.len.set(len);
        Box::pin(async { Ok(()) })
    }
    fn set_writable(&self, _: bool) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async { Ok(()) })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move {
            let NullOptions { driver, size, .. } = self.options;
            let zeroes = if self.options.read_zeroes { "\"read-zeroes\": true, " } else { "" };
            let filename = match size == 1 << 30 {
                true if zeroes.is_empty() => format!("{driver}://"),
                true => format!("json:{{{zeroes}\"driver\": \"{driver}\"}}"),
                false => format!("json:{{{zeroes}\"driver\": \"{driver}\", \"size\": {size}}}"),
            };
            Ok(NodeDetails { filename, actual_size: Some(0), ..NodeDetails::default() })
        })
    }
    fn as_any(&self) -> &dyn Any {
        self
    }
}
