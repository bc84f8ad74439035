//! Reading the fields of an option or option reply that is already complete in memory.

use crate::proto::MAX_STRING;

/// A cursor over one option's data. Every read is checked; `Err` says what is wrong.
pub(crate) struct Fields<'a> {
    left: &'a [u8],
}

pub(crate) type Checked<T> = Result<T, String>;

impl<'a> Fields<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Fields<'a> {
        Fields { left: bytes }
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Checked<&'a [u8]> {
        let (a, b) = self.left.split_at_checked(n).ok_or("data ends inside a field")?;
        self.left = b;
        Ok(a)
    }

    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let (a, b) = self.left.split_first_chunk::<N>().ok_or("data ends inside a field")?;
        self.left = b;
        Ok(*a)
    }

    pub(crate) fn u16(&mut self) -> Checked<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Checked<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Checked<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// All that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    /// A string with its length in front.
    pub(crate) fn string(&mut self, what: &str) -> Checked<&'a str> {
        let n = self.u32()? as usize;
        if n > MAX_STRING {
            return Err(format!("{what} of {n} bytes is longer than {MAX_STRING}"));
        }
        text(self.bytes(n)?, what)
    }

    pub(crate) fn end(&self) -> Checked<()> {
        if self.left.is_empty() { Ok(()) } else { Err(format!("{} bytes too many", self.left.len())) }
    }
}

/// Bytes that must be a protocol string: UTF-8, no NUL, not longer than allowed.
pub(crate) fn text<'a>(bytes: &'a [u8], what: &str) -> Checked<&'a str> {
    if bytes.len() > MAX_STRING {
        return Err(format!("{what} of {} bytes is longer than {MAX_STRING}", bytes.len()));
    }
    if bytes.contains(&0) {
        return Err(format!("{what} contains a NUL byte"));
    }
    std::str::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
}
