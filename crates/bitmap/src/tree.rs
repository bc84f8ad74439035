//! The hierarchy below a bitmap: leaf chunks of words, inner levels of 64 children each.
//!
//! A child that is wholly clean or wholly dirty is two summary bits in its parent and takes no memory. What must stay
//! true: a child exists in memory exactly when it is mixed (`any` set, `all` clear), and `count` is the number of set
//! bits below. Both searches (next set, next clean) look at one summary word per level.

/// Part of the hierarchy that holds `BITS` bits.
pub(crate) trait Part: Sized + Clone {
    /// Bits below this part.
    const BITS: u64;
    /// All bits clear, or all set.
    fn uniform(on: bool) -> Self;
    /// Set bits below.
    fn count(&self) -> u64;
    /// Set bits in `[lo, hi)`.
    fn count_in(&self, lo: u64, hi: u64) -> u64;
    /// Gives the bits `[lo, hi)` the value `on`.
    fn assign(&mut self, lo: u64, hi: u64, on: bool);
    /// First bit at or after `from` that has the value `on`.
    fn next(&self, from: u64, on: bool) -> Option<u64>;
    /// Sets all bits that `other` has.
    fn merge(&mut self, other: &Self);
    /// The bits `[64 * i, 64 * i + 64)`, the first one lowest.
    fn word(&self, i: u64) -> u64;
    /// Sets those of the bits `[64 * i, 64 * i + 64)` that `word` has.
    fn add_word(&mut self, i: u64, word: u64);
}

/// 64 words of 64 bits.
#[derive(Clone)]
pub(crate) struct Chunk {
    words: [u64; 64],
    any: u64,
    all: u64,
    count: u64,
}

/// The bits `[lo, hi)` of a word, `hi <= 64`.
fn mask(lo: u64, hi: u64) -> u64 {
    debug_assert!(lo < hi && hi <= 64);
    (!0u64 << lo) & (!0u64 >> (64 - hi))
}

impl Chunk {
    fn put(&mut self, i: usize, word: u64) {
        self.count = self.count - u64::from(self.words[i].count_ones()) + u64::from(word.count_ones());
        self.words[i] = word;
        let bit = 1u64 << i;
        self.any = if word != 0 { self.any | bit } else { self.any & !bit };
        self.all = if word == !0 { self.all | bit } else { self.all & !bit };
    }
}

impl Part for Chunk {
    const BITS: u64 = 64 * 64;

    fn uniform(on: bool) -> Chunk {
        let w = if on { !0 } else { 0 };
        Chunk { words: [w; 64], any: w, all: w, count: if on { Self::BITS } else { 0 } }
    }

    fn count(&self) -> u64 {
        self.count
    }

    fn count_in(&self, lo: u64, hi: u64) -> u64 {
        let words = lo / 64..hi.div_ceil(64);
        let ones = |i: u64| {
            let m = mask(lo.max(i * 64) - i * 64, hi.min(i * 64 + 64) - i * 64);
            u64::from((self.words[i as usize] & m).count_ones())
        };
        words.map(ones).sum()
    }

    fn assign(&mut self, lo: u64, hi: u64, on: bool) {
        for i in lo / 64..hi.div_ceil(64) {
            let m = mask(lo.max(i * 64) - i * 64, hi.min(i * 64 + 64) - i * 64);
            let old = self.words[i as usize];
            self.put(i as usize, if on { old | m } else { old & !m });
        }
    }

    fn next(&self, from: u64, on: bool) -> Option<u64> {
        let flip = if on { 0 } else { !0 };
        let i = from / 64;
        let here = (self.words[i as usize] ^ flip) & (!0 << (from % 64));
        if here != 0 {
            return Some(i * 64 + u64::from(here.trailing_zeros()));
        }
        let summary = if on { self.any } else { !self.all };
        let j = later(summary, i)?;
        let word = self.words[j as usize] ^ flip;
        Some(j * 64 + u64::from(word.trailing_zeros()))
    }

    fn merge(&mut self, other: &Chunk) {
        let mut left = other.any & !self.all;
        while left != 0 {
            let i = left.trailing_zeros() as usize;
            left &= left - 1;
            self.put(i, self.words[i] | other.words[i]);
        }
    }

    fn word(&self, i: u64) -> u64 {
        self.words[i as usize]
    }

    fn add_word(&mut self, i: u64, word: u64) {
        self.put(i as usize, self.words[i as usize] | word);
    }
}

/// The first set bit of `summary` after bit `i`.
fn later(summary: u64, i: u64) -> Option<u64> {
    let rest = if i == 63 { 0 } else { summary & (!0 << (i + 1)) };
    if rest == 0 { None } else { Some(u64::from(rest.trailing_zeros())) }
}

/// 64 children.
#[derive(Clone)]
pub(crate) struct Inner<P> {
    kids: [Option<Box<P>>; 64],
    any: u64,
    all: u64,
    count: u64,
}

impl<P: Part> Inner<P> {
    fn state(&self, i: u64) -> Option<bool> {
        match (self.any >> i & 1, self.all >> i & 1) {
            (0, _) => Some(false),
            (_, 1) => Some(true),
            _ => None,
        }
    }

    /// Gives child `i` one value throughout.
    fn flatten(&mut self, i: u64, on: bool) {
        let bit = 1u64 << i;
        self.kids[i as usize] = None;
        self.any = if on { self.any | bit } else { self.any & !bit };
        self.all = if on { self.all | bit } else { self.all & !bit };
    }

    fn kid_count(&self, i: u64) -> u64 {
        match (&self.kids[i as usize], self.state(i)) {
            (Some(k), _) => k.count(),
            (None, Some(true)) => P::BITS,
            (None, _) => 0,
        }
    }

    /// Lets `change` work on child `i`, then keeps the child only if it is mixed.
    fn change(&mut self, i: u64, change: impl FnOnce(&mut P)) {
        let before = self.kid_count(i);
        let uniform = self.state(i) == Some(true);
        let kid = self.kids[i as usize].get_or_insert_with(|| Box::new(P::uniform(uniform)));
        change(kid);
        let after = kid.count();
        self.count = self.count - before + after;
        if after == 0 {
            self.flatten(i, false);
        } else if after == P::BITS {
            self.flatten(i, true);
        } else {
            self.any |= 1 << i;
            self.all &= !(1 << i);
        }
    }
}

impl<P: Part> Part for Inner<P> {
    const BITS: u64 = P::BITS * 64;

    fn uniform(on: bool) -> Inner<P> {
        let w = if on { !0 } else { 0 };
        Inner { kids: std::array::from_fn(|_| None), any: w, all: w, count: if on { Self::BITS } else { 0 } }
    }

    fn count(&self) -> u64 {
        self.count
    }

    fn count_in(&self, lo: u64, hi: u64) -> u64 {
        let part = |i: u64| {
            let base = i * P::BITS;
            let (l, h) = (lo.max(base) - base, hi.min(base + P::BITS) - base);
            match (&self.kids[i as usize], self.state(i)) {
                (Some(k), _) => k.count_in(l, h),
                (None, Some(true)) => h - l,
                (None, _) => 0,
            }
        };
        (lo / P::BITS..hi.div_ceil(P::BITS)).map(part).sum()
    }

    fn assign(&mut self, lo: u64, hi: u64, on: bool) {
        for i in lo / P::BITS..hi.div_ceil(P::BITS) {
            if self.state(i) == Some(on) {
                continue;
            }
            let base = i * P::BITS;
            let (l, h) = (lo.max(base) - base, hi.min(base + P::BITS) - base);
            if l == 0 && h == P::BITS {
                self.count = self.count - self.kid_count(i) + if on { P::BITS } else { 0 };
                self.flatten(i, on);
            } else {
                self.change(i, |k| k.assign(l, h, on));
            }
        }
    }

    fn next(&self, from: u64, on: bool) -> Option<u64> {
        let i = from / P::BITS;
        let found = match (self.state(i), &self.kids[i as usize]) {
            (Some(s), _) => (s == on).then_some(from),
            (None, Some(k)) => k.next(from % P::BITS, on).map(|n| i * P::BITS + n),
            (None, None) => None,
        };
        if found.is_some() {
            return found;
        }
        let j = later(if on { self.any } else { !self.all }, i)?;
        let inside = match &self.kids[j as usize] {
            Some(k) => k.next(0, on)?,
            None => 0,
        };
        Some(j * P::BITS + inside)
    }

    fn merge(&mut self, other: &Inner<P>) {
        let mut left = other.any & !self.all;
        while left != 0 {
            let i = u64::from(left.trailing_zeros());
            left &= left - 1;
            match &other.kids[i as usize] {
                None => self.assign(i * P::BITS, (i + 1) * P::BITS, true),
                Some(theirs) => self.change(i, |ours| ours.merge(theirs)),
            }
        }
    }

    fn word(&self, i: u64) -> u64 {
        let words = P::BITS / 64;
        match (self.state(i / words), &self.kids[(i / words) as usize]) {
            (None, Some(k)) => k.word(i % words),
            (all, _) => u64::from(all == Some(true)).wrapping_neg(),
        }
    }

    fn add_word(&mut self, i: u64, word: u64) {
        let words = P::BITS / 64;
        if self.state(i / words) != Some(true) {
            self.change(i / words, |k| k.add_word(i % words, word));
        }
    }
}
