//! What a node can take in one request, and how a request may be carried out.

/// Limits of a node. All in bytes; 0 in a maximum means "no limit of its own".
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Offsets and lengths of requests must be multiples of this (power of two). The edge above does read-modify-write
    /// for requests that are not.
    pub request_alignment: u64,
    /// Alignment of memory for direct I/O (power of two).
    pub memory_alignment: u64,
    /// Preferred unit: the cluster size of a format, 0 where there is none.
    pub cluster_size: u64,
    /// Largest read or write.
    pub max_transfer: u64,
    /// Whether zero requests with `may_unmap` are cheap and give space back (QSD's "efficient zero").
    pub efficient_zero: bool,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            request_alignment: 1,
            memory_alignment: 1,
            cluster_size: 0,
            max_transfer: 0,
            efficient_zero: false,
        }
    }
}

/// How a request may be carried out. Default: nothing special.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReqFlags {
    /// The request is done only when it is on stable storage (force unit access).
    pub fua: bool,
    /// A zero request may give the space back.
    pub may_unmap: bool,
    /// A zero request must fail with ENOTSUP rather than write zeroes slowly.
    pub no_fallback: bool,
    /// Store the data compressed, if the format can; the span is whole clusters (or ends at the end of the disk).
    pub compressed: bool,
    /// The write does not change what the disk reads as (permission `write-unchanged` suffices).
    pub unchanged: bool,
}

impl ReqFlags {
    /// No flag set.
    pub const NONE: ReqFlags =
        ReqFlags { fua: false, may_unmap: false, no_fallback: false, compressed: false, unchanged: false };
}

/// How space is set aside when an image is created or grown.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Prealloc {
    /// Nothing ahead of use.
    #[default]
    Off,
    /// Format metadata only.
    Metadata,
    /// Space by `fallocate`, unwritten.
    Falloc,
    /// Space by writing zeroes.
    Full,
}
