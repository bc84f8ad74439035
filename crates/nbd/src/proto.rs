//! Numbers of the protocol (NBD `proto.md`) and the limits that this implementation sets.

/// First eight bytes of a server: "NBDMAGIC".
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Second eight bytes of a newstyle server and first of each option: "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second eight bytes of an oldstyle server.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of an option reply.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of an extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// Handshake flags, both directions (`FIXED_NEWSTYLE` and `NO_ZEROES` have the same bits in both).
pub mod handshake {
    /// The fixed newstyle handshake.
    pub const FIXED_NEWSTYLE: u32 = 1;
    /// No 124 zero bytes after `EXPORT_NAME`.
    pub const NO_ZEROES: u32 = 2;
}

/// Options of the handshake.
pub mod opt {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;

    /// The option's name for messages.
    pub fn name(option: u32) -> &'static str {
        match option {
            EXPORT_NAME => "export name",
            ABORT => "abort",
            LIST => "list",
            STARTTLS => "starttls",
            INFO => "info",
            GO => "go",
            STRUCTURED_REPLY => "structured reply",
            LIST_META_CONTEXT => "list meta context",
            SET_META_CONTEXT => "set meta context",
            EXTENDED_HEADERS => "extended headers",
            _ => "<unknown>",
        }
    }
}

/// Types of option replies; the upper bit marks errors.
pub mod rep {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR | 1;
    pub const ERR_POLICY: u32 = ERROR | 2;
    pub const ERR_INVALID: u32 = ERROR | 3;
    pub const ERR_PLATFORM: u32 = ERROR | 4;
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// Information types of `INFO` and `GO`.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const ROTATIONAL: u16 = 1 << 4;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_RESIZE: u16 = 1 << 9;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Flags of one command.
pub mod cmd_flag {
    #![allow(missing_docs)]
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of reply chunks; the upper bit marks errors.
pub mod chunk {
    #![allow(missing_docs)]
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT | 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT | 2;
    /// Chunk flag: the last chunk of a reply.
    pub const DONE: u16 = 1;
}

/// Flags of `base:allocation` extents.
pub mod state {
    /// No space is behind the extent.
    pub const HOLE: u64 = 1;
    /// The extent reads as zero.
    pub const ZERO: u64 = 2;
    /// In a context `qemu:dirty-bitmap:NAME`: the bitmap marks the extent.
    pub const DIRTY: u64 = 1;
}

/// Error numbers on the wire.
pub mod wire_error {
    #![allow(missing_docs)]
    pub const PERM: u32 = 1;
    pub const IO: u32 = 5;
    pub const NOMEM: u32 = 12;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
    pub const OVERFLOW: u32 = 75;
    pub const NOTSUP: u32 = 95;
    pub const SHUTDOWN: u32 = 108;
}

/// Commands of the transmission phase.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
pub enum Cmd {
    /// Read bytes.
    Read = 0,
    /// Write bytes.
    Write = 1,
    /// The client goes away.
    Disconnect = 2,
    /// Make completed writes durable.
    Flush = 3,
    /// Bytes are not needed.
    Trim = 4,
    /// Bytes will be needed soon.
    Cache = 5,
    /// Make bytes read as zero.
    WriteZeroes = 6,
    /// Ask what is where.
    BlockStatus = 7,
}

impl Cmd {
    /// The command with number `n`.
    pub fn from_wire(n: u16) -> Option<Cmd> {
        Some(match n {
            0 => Cmd::Read,
            1 => Cmd::Write,
            2 => Cmd::Disconnect,
            3 => Cmd::Flush,
            4 => Cmd::Trim,
            5 => Cmd::Cache,
            6 => Cmd::WriteZeroes,
            7 => Cmd::BlockStatus,
            _ => return None,
        })
    }

    /// Whether the disk has other bytes afterwards.
    pub fn changes(self) -> bool {
        matches!(self, Cmd::Write | Cmd::Trim | Cmd::WriteZeroes)
    }

    /// The name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Cmd::Read => "read",
            Cmd::Write => "write",
            Cmd::Disconnect => "disconnect",
            Cmd::Flush => "flush",
            Cmd::Trim => "trim",
            Cmd::Cache => "cache",
            Cmd::WriteZeroes => "write zeroes",
            Cmd::BlockStatus => "block status",
        }
    }
}

/// How requests and replies are framed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Mode {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, structured replies.
    Structured,
    /// Extended requests and replies, 64-bit lengths.
    Extended,
}

/// Longest string (export name, description, context name) in the protocol.
pub const MAX_STRING: usize = 4096;
/// Longest payload of a request or data chunk; what the protocol names as the size every server should take.
pub const MAX_PAYLOAD: u64 = 32 << 20;
/// Preferred block size that a server tells when the node knows no better.
pub const PREFERRED_BLOCK: u32 = 4096;
/// Longest option that is kept. Longer ones, up to [`MAX_PAYLOAD`], are skipped and refused: so much memory may a
/// client take before it has shown that it knows the name of an export.
pub const MAX_OPTION: u32 = 64 << 10;
/// Most information types looked at in one `INFO` or `GO`.
pub const MAX_INFO_REQUESTS: usize = 64;
/// Most extents in one block status reply of ours (128 KiB of reply in the longest form).
pub const MAX_STATUS_EXTENTS: usize = 8192;
/// Most extents taken from a server in one block status reply: what QEMU sends at most.
pub const MAX_STATUS_EXTENTS_ACCEPTED: u64 = 128 << 10;
/// Most replies that a client reads for one of its options: a server listing more contexts or infos is not sane.
pub const MAX_OPTION_REPLIES: u32 = 4096;
