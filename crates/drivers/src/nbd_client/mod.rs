//! The `nbd` driver: a disk that an NBD server holds.
//!
//! Negotiates the best that both sides know (extended or structured replies, `base:allocation`, block sizes), keeps
//! several connections where the server promises that a flush on one covers all, and survives the server's restart if
//! told to wait (`reconnect-delay`). The server is not trusted: see the crate `nbd`.
//!
//! What must stay true: no wrong bytes, whatever the server does; a request that the server lacks is done another way or
//! refused by name, never silently dropped (a flush that cannot be sent is not needed: the server said it has no cache).

mod adrift;
mod handshake;
mod link;
mod pool;

use block::{BlockError, Data, ErrorKind, Extent, Io, Kind, Limits, ReqFlags, Result, Span};
use env::{Address, Env};
use graph::{Demand, Edge, HostBytes, Node, NodeDetails};
use link::{Failure, Outcome, Payload};
use nbd::proto::{MAX_PAYLOAD, MAX_STRING, cmd_flag, flag, state};
use nbd::{Cmd, Mode, StatusExtent, leaf};
use pool::Pool;
use std::fmt;
use std::rc::Rc;

/// Connections to one export if the server allows several and the user says nothing. QSD takes at most 16 requests from
/// one connection; a second is used only when one has [`FILL`] in flight.
pub const DEFAULT_CONNECTIONS: u32 = 4;
/// Most connections to one export.
pub const MAX_CONNECTIONS: u32 = 16;
/// Requests on one link before the next is used.
const FILL: usize = 16;
/// Longest piece of a request without payload where lengths have 32 bits: a multiple of every block size.
const COMPACT_PIECE: u64 = 1 << 31;
/// Longest piece in extended mode: bounds what one request can take, 1 TiB.
const EXTENDED_PIECE: u64 = 1 << 40;
/// Piece in which zeroes are written to a server that cannot write zeroes itself.
const ZERO_PIECE: u64 = 4 << 20;
/// Alignment where the server does not tell one, as the protocol advises.
const UNTOLD_BLOCK: u64 = 512;

/// Options of the driver; names as in QMP.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// Where the server is.
    pub server: Address,
    /// Name of the export.
    pub export: String,
    /// Seconds that requests wait for a lost server; 0: not at all.
    pub reconnect_delay: u32,
    /// Seconds to try connecting when the node is opened; 0: once.
    pub open_timeout: u32,
    /// Connections, if the server allows several.
    pub connections: u32,
    /// Metadata context to report instead of `base:allocation`.
    pub x_dirty_bitmap: Option<String>,
    /// How connections are protected; `None`: everything in the clear.
    pub tls: Option<ClientTls>,
    /// The node is not to be written.
    pub read_only: bool,
    /// The node may be read-only if the server is.
    pub auto_read_only: bool,
}

/// TLS on every connection.
#[derive(Clone)]
pub struct ClientTls {
    /// Our certificate, if we have one, and whom we trust.
    pub credentials: Rc<tls::Credentials>,
    /// The name that the server's certificate must be for.
    pub hostname: Option<String>,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("hostname", &self.hostname).finish_non_exhaustive()
    }
}

impl NbdOptions {
    /// An export of a server, everything else as by default.
    pub fn new(server: Address, export: &str) -> NbdOptions {
        NbdOptions {
            server,
            export: export.to_owned(),
            reconnect_delay: 0,
            open_timeout: 0,
            connections: DEFAULT_CONNECTIONS,
            x_dirty_bitmap: None,
            tls: None,
            read_only: false,
            auto_read_only: false,
        }
    }
}

/// A node whose bytes an NBD server holds.
pub struct NbdClient {
    pool: Rc<Pool>,
    read_only: bool,
}

impl NbdClient {
    /// Connects to the server and enters the export.
    pub async fn open(env: &Env, options: NbdOptions) -> Result<Rc<NbdClient>> {
        check(&options)?;
        let (read_only, auto) = (options.read_only, options.auto_read_only);
        let bitmap = options.x_dirty_bitmap.clone();
        let pool = Pool::open(env, options).await?;
        let n = pool.negotiated();
        let refused = if let Some(b) = bitmap.filter(|_| n.contexts.is_empty()) {
            Some(BlockError::invalid(format!("x-dirty-bitmap '{b}' is not offered by the NBD server")))
        } else if n.flags & flag::READ_ONLY != 0 && !read_only && !auto {
            let e = BlockError::from_errno(BlockError::EACCES).context("Could not open image");
            Some(e.with_hint("The NBD export is read-only: open it with read-only=on or auto-read-only=on"))
        } else {
            None
        };
        if let Some(e) = refused {
            pool.close().await;
            return Err(e);
        }
        let read_only = read_only || n.flags & flag::READ_ONLY != 0;
        Ok(Rc::new(NbdClient { pool, read_only }))
    }

    /// Ends all connections at once, whatever they wait for: requests fail, and none is sent any more (`yank`).
    pub fn hang_up(&self) {
        self.pool.abandon();
    }

    /// Whether the node can only be read, because it was opened so or the server says so.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn has(&self, f: u16) -> bool {
        self.pool.negotiated().flags & f != 0
    }

    fn piece(&self) -> u64 {
        if self.pool.negotiated().mode == Mode::Extended { EXTENDED_PIECE } else { COMPACT_PIECE }
    }

    async fn plain(&self, cmd: Cmd, flags: u16, span: Span, payload: Data) -> Result<()> {
        self.pool.call(cmd, flags, span, Payload::Data(payload)).await.map(|_| ())
    }

    /// From the file straight into the socket, which TLS cannot.
    async fn do_write_from(&self, offset: u64, from: HostBytes) -> Result<()> {
        if !self.pool.sends_from(&from.file)? {
            return Err(BlockError::unsupported("the host cannot send these bytes"));
        }
        let at = Span::new(offset, from.at.len);
        self.pool.call(Cmd::Write, 0, at, Payload::Host(from)).await.map(|_| ())
    }

    /// The flag for forced unit access, or whether a flush has to follow.
    fn fua(&self, wanted: bool) -> (u16, bool) {
        match wanted {
            false => (0, false),
            true if self.has(flag::SEND_FUA) => (cmd_flag::FUA, false),
            true => (0, true),
        }
    }

    async fn do_write(&self, at: Span, data: Data, flags: ReqFlags) -> Result<()> {
        let (f, flush) = self.fua(flags.fua);
        self.plain(Cmd::Write, f, at, data).await?;
        if flush { self.do_flush().await } else { Ok(()) }
    }

    async fn do_flush(&self) -> Result<()> {
        if self.has(flag::SEND_FLUSH) {
            self.plain(Cmd::Flush, 0, Span::new(0, 0), Data::empty()).await?;
        }
        Ok(())
    }

    async fn do_zero(&self, at: Span, flags: ReqFlags) -> Result<()> {
        let fast = if flags.no_fallback { flag::SEND_FAST_ZERO } else { 0 };
        let able = self.has(flag::SEND_WRITE_ZEROES) && (fast == 0 || self.has(fast));
        if !able && flags.no_fallback {
            return Err(BlockError::unsupported("NBD server cannot zero fast"));
        }
        let (mut f, flush) = self.fua(flags.fua);
        if !flags.may_unmap && able {
            f |= cmd_flag::NO_HOLE;
        }
        if fast != 0 {
            f |= cmd_flag::FAST_ZERO;
        }
        let mut left = at;
        while !left.is_empty() {
            let limit = if able { self.piece() } else { ZERO_PIECE.min(self.limits().max_transfer) };
            let (now, rest) = left.split_at(limit);
            if able {
                self.plain(Cmd::WriteZeroes, f, now, Data::empty()).await?;
            } else {
                self.plain(Cmd::Write, f, now, Data::zeroes(now.len as usize)).await?;
            }
            left = rest;
        }
        if flush { self.do_flush().await } else { Ok(()) }
    }

    async fn do_discard(&self, at: Span) -> Result<()> {
        let mut left = at;
        while !left.is_empty() && self.has(flag::SEND_TRIM) {
            let (now, rest) = left.split_at(self.piece());
            self.plain(Cmd::Trim, 0, now, Data::empty()).await?;
            left = rest;
        }
        Ok(())
    }

    async fn do_extents(&self, at: Span) -> Result<Vec<Extent>> {
        let data = |span: Span| Extent { host: Some(span.start), ..Extent::new(span, Kind::Data) };
        if self.pool.negotiated().contexts.is_empty() || at.is_empty() {
            return Ok(if at.is_empty() { Vec::new() } else { vec![data(at)] });
        }
        let (asked, _) = at.split_at(self.piece());
        let list = match self.pool.call(Cmd::BlockStatus, 0, asked, Payload::none()).await? {
            Outcome::Status(list) => list,
            Outcome::Done | Outcome::Data(_) => Vec::new(),
        };
        Ok(self.translate(at, &list))
    }

    /// Nothing where the server tells none, or the link is lost: then the bytes are read, which waits for it as told.
    async fn do_leaf_hashes(&self, at: Span) -> Result<Option<Vec<[u8; 32]>>> {
        if !leaf::is_whole(at, self.pool.negotiated().size) {
            return Ok(None);
        }
        let (mut hashes, mut left) = (Vec::new(), at);
        while !left.is_empty() {
            let Some(link) = self.pool.hash_link().await else { return Ok(None) };
            let answer = match link.call(Cmd::BlockStatus, 0, left, Payload::none()).await {
                Ok(Outcome::Status(list)) => leaf::decode(link.negotiated().mode, left, &list),
                Ok(Outcome::Done | Outcome::Data(_)) => None,
                Err(Failure::Refused(e)) => return Err(e),
                Err(Failure::Lost(_)) => return Ok(None),
            };
            let Some(some) = answer else {
                self.pool.no_hashes();
                return Ok(None);
            };
            left = left.split_at(some.len() as u64 * leaf::LEN).1;
            hashes.extend(some);
        }
        Ok(Some(hashes))
    }

    fn translate(&self, at: Span, list: &[StatusExtent]) -> Vec<Extent> {
        let hole = if self.pool.options().x_dirty_bitmap.is_some() { Kind::Unallocated } else { Kind::Data };
        let (mut out, mut left) = (Vec::with_capacity(list.len()), at);
        for e in list {
            let (span, rest) = left.split_at(e.len);
            let kind = match e.flags {
                f if f & state::ZERO != 0 => Kind::Zero,
                f if f & state::HOLE != 0 => hole,
                _ => Kind::Data,
            };
            let host = (kind == Kind::Data).then_some(span.start);
            Extent::push_merged(&mut out, Extent { host, ..Extent::new(span, kind) });
            left = rest;
        }
        out
    }

    fn filename(&self) -> String {
        let o = self.pool.options();
        match &o.server {
            Address::Unix(path) if o.export.is_empty() => format!("nbd+unix://?socket={}", path.display()),
            Address::Unix(path) => format!("nbd+unix:///{}?socket={}", o.export, path.display()),
            Address::Tcp { host, port, .. } if o.export.is_empty() => {
                format!("nbd://{}:{port}", bracketed(host))
            }
            Address::Tcp { host, port, .. } => format!("nbd://{}:{port}/{}", bracketed(host), o.export),
            other => format!("nbd:{other}:exportname={}", o.export),
        }
    }
}

/// An IPv6 address as URIs want it.
fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn check(o: &NbdOptions) -> Result<()> {
    if o.export.len() > MAX_STRING {
        return Err(BlockError::invalid("export name too long to send to server"));
    }
    if o.x_dirty_bitmap.as_ref().is_some_and(|b| b.len() > MAX_STRING) {
        return Err(BlockError::invalid("x-dirty-bitmap query too long to send to server"));
    }
    if o.connections == 0 || o.connections > MAX_CONNECTIONS {
        return Err(BlockError::invalid(format!("connections must be from 1 to {MAX_CONNECTIONS}")));
    }
    Ok(())
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        self.pool.abandon();
    }
}

impl Node for NbdClient {
    fn driver(&self) -> &'static str {
        "nbd"
    }
    fn len(&self) -> u64 {
        self.pool.negotiated().size
    }
    fn limits(&self) -> Limits {
        let n = self.pool.negotiated();
        let told = n.preferred_block != 0;
        let untold = if n.size.is_multiple_of(UNTOLD_BLOCK) { UNTOLD_BLOCK } else { 1 };
        Limits {
            request_alignment: if told { u64::from(n.min_block) } else { untold },
            max_transfer: u64::from(n.max_block).min(MAX_PAYLOAD),
            efficient_zero: self.has(flag::SEND_WRITE_ZEROES),
            ..Limits::default()
        }
    }
    fn edges(&self) -> Vec<Rc<Edge>> {
        Vec::new()
    }
    fn wants(&self, _: &Edge, above: Demand, _: bool) -> Demand {
        above
    }
    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            if at.is_empty() {
                return Ok(Data::empty());
            }
            match self.pool.call(Cmd::Read, 0, at, Payload::none()).await? {
                Outcome::Data(data) => Ok(data),
                Outcome::Done | Outcome::Status(_) => {
                    Err(BlockError::corrupt("NBD server sent no data for a read"))
                }
            }
        })
    }
    fn write(&self, at: Span, data: Data, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.do_write(at, data, flags))
    }
    fn write_from(&self, offset: u64, from: HostBytes) -> Io<'_> {
        Box::pin(self.do_write_from(offset, from))
    }
    fn zero(&self, at: Span, flags: ReqFlags) -> Io<'_> {
        Box::pin(self.do_zero(at, flags))
    }
    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(self.do_discard(at))
    }
    fn extents(&self, at: Span) -> Io<'_, Vec<Extent>> {
        Box::pin(self.do_extents(at))
    }
    fn leaf_hashes(&self, at: Span) -> Io<'_, Option<Vec<[u8; 32]>>> {
        Box::pin(self.do_leaf_hashes(at))
    }
    fn flush(&self) -> Io<'_> {
        Box::pin(self.do_flush())
    }
    fn set_writable(&self, writable: bool) -> Io<'_> {
        Box::pin(async move {
            if writable && self.has(flag::READ_ONLY) {
                return Err(BlockError::new(ErrorKind::ReadOnly, "The NBD export is read-only"));
            }
            if !writable {
                self.pool.landed().await;
            }
            Ok(())
        })
    }
    fn set_active(&self, on: bool) -> Io<'_> {
        Box::pin(async move {
            if !on {
                self.pool.landed().await;
            }
            Ok(())
        })
    }
    fn close(&self) -> Io<'_> {
        Box::pin(async move {
            self.pool.close().await;
            Ok(())
        })
    }
    fn details(&self) -> Io<'_, NodeDetails> {
        Box::pin(async move { Ok(NodeDetails { filename: self.filename(), ..NodeDetails::default() }) })
    }
    fn link(&self) -> Option<Rc<dyn graph::Link>> {
        Some(self.pool.clone())
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
