//! The bitmap against a set of granules.
#![allow(missing_docs, clippy::unwrap_used)]

use bitmap::{Bitmap, DirtyBitmap};
use block::Span;
use proptest::prelude::*;
use std::collections::BTreeSet;

const G: u64 = 4096;

#[derive(Clone, Debug)]
enum Op {
    Set(u64, u64),
    Clear(u64, u64),
    Resize(u64),
    SetAll,
    ClearAll,
    MergeFine(Vec<(u64, u64)>),
    MergeCoarse(Vec<(u64, u64)>),
    MergeSame(Vec<(u64, u64)>),
    Take,
}

/// Lengths around the borders of words (64 granules), chunks (4096), inner levels (2^18).
fn offset() -> impl Strategy<Value = u64> {
    let near = |g: u64| (g * G).saturating_sub(3 * G)..g * G + 3 * G;
    prop_oneof![0..600 * G, near(64), near(4096), near(8192), near(1 << 18), 0..(1u64 << 20) * G]
}

fn span() -> impl Strategy<Value = (u64, u64)> {
    (offset(), prop_oneof![0..3 * G, 0..300 * G, 0..(1u64 << 19) * G])
}

fn op() -> impl Strategy<Value = Op> {
    let small = || prop::collection::vec((offset(), 0..200 * G), 0..4);
    prop_oneof![
        8 => span().prop_map(|(a, b)| Op::Set(a, b)),
        8 => span().prop_map(|(a, b)| Op::Clear(a, b)),
        2 => offset().prop_map(Op::Resize),
        1 => Just(Op::SetAll),
        1 => Just(Op::ClearAll),
        1 => small().prop_map(Op::MergeFine),
        1 => small().prop_map(Op::MergeCoarse),
        2 => prop::collection::vec(span(), 0..4).prop_map(Op::MergeSame),
        1 => Just(Op::Take),
    ]
}

/// Runs of dirty granules as a set of disjoint, non-touching ranges: as slow and plain as can be, but for big runs.
#[derive(Default, Clone)]
struct Model {
    edges: BTreeSet<u64>, // granules where the value flips, starting clean
    len: u64,
}

impl Model {
    fn granules(&self) -> u64 {
        self.len.div_ceil(G)
    }
    fn get(&self, g: u64) -> bool {
        self.edges.range(..=g).count() % 2 == 1
    }
    fn assign(&mut self, lo: u64, hi: u64, on: bool) {
        if lo >= hi {
            return;
        }
        let (before, after) = (lo > 0 && self.get(lo - 1), self.get(hi));
        let inside: Vec<u64> = self.edges.range(lo..=hi).copied().collect();
        for e in inside {
            self.edges.remove(&e);
        }
        if before != on {
            self.edges.insert(lo);
        }
        if on != after {
            self.edges.insert(hi);
        }
    }
    fn set(&mut self, at: Span) {
        let end = at.end().min(self.len);
        if at.start < end {
            self.assign(at.start / G, end.div_ceil(G), true);
        }
    }
    fn runs(&self) -> Vec<Span> {
        let e: Vec<u64> = self.edges.iter().copied().collect();
        e.chunks(2).map(|c| Span::between(c[0] * G, (c[1] * G).min(self.len))).collect()
    }
}

fn build(len: u64, g: u64, spans: &[(u64, u64)]) -> Bitmap {
    let mut b = Bitmap::new(len, g).unwrap();
    spans.iter().for_each(|(a, l)| b.set(Span::new(*a, *l)));
    b
}

fn check(b: &Bitmap, m: &Model) {
    let runs = m.runs();
    assert_eq!(b.areas(Span::new(0, b.len()), 0).collect::<Vec<_>>(), runs);
    let granules: u64 = runs.iter().map(|r| r.len.div_ceil(G)).sum();
    assert_eq!(b.count(), granules * G);
    assert_eq!(b.dirty_bytes(), runs.iter().map(|r| r.len).sum::<u64>());
    assert_eq!(b.is_empty(), runs.is_empty());
    for r in runs.iter().take(20) {
        assert_eq!(b.next_clean(r.start), (r.end() < b.len()).then_some(r.end()));
        assert!(b.get(r.start) && b.get(r.end() - 1) && !b.get(r.end().next_multiple_of(G)));
        assert!(r.start == 0 || !b.get(r.start - 1));
        let cut: Vec<Span> = b.areas(*r, r.len / 3 + 1).collect();
        assert_eq!(cut.iter().map(|c| c.len).sum::<u64>(), r.len);
        assert!(cut.iter().all(|c| c.len <= r.len / 3 + 1));
        for at in [Span::new(r.start / 2, r.len), Span::new(r.start + 1, r.len * 3), *r] {
            let inside: u64 = runs.iter().map(|r| r.intersect(&at).len).sum();
            assert_eq!(b.count_in(at), inside, "{at}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn behaves_like_a_set(len in offset(), ops in prop::collection::vec(op(), 1..25)) {
        let mut b = Bitmap::new(len, G).unwrap();
        let mut m = Model { len, ..Model::default() };
        for op in ops {
            match op {
                Op::Set(a, l) => { b.set(Span::new(a, l)); m.set(Span::new(a, l)); }
                Op::Clear(a, l) => {
                    b.clear(Span::new(a, l));
                    let end = (a + l).min(m.len);
                    let hi = if a + l >= m.len { m.granules() } else { end / G };
                    if a < end { m.assign(a.div_ceil(G), hi, false); }
                }
                Op::Resize(n) => {
                    b.resize(n).unwrap();
                    let (old, new) = (m.granules(), n.div_ceil(G));
                    m.assign(new, old.max(new), false);
                    m.len = n;
                }
                Op::SetAll => { b.set_all(); let n = m.granules(); m.assign(0, n, true); }
                Op::ClearAll => { b.clear_all(); m.edges.clear(); }
                Op::MergeFine(s) | Op::MergeCoarse(s) if s.is_empty() => { b.merge(&build(m.len, G, &[])); }
                Op::MergeFine(s) => {
                    b.merge(&build(m.len, 512, &s));
                    s.iter().for_each(|(a, l)| m.set(Span::new(*a, *l)));
                }
                Op::MergeCoarse(s) => {
                    b.merge(&build(m.len, 65536, &s));
                    for (a, l) in s {
                        let cut = Span::new(a, l).intersect(&Span::new(0, m.len));
                        if !cut.is_empty() { m.set(cut.align_out(65536)); }
                    }
                }
                Op::MergeSame(s) => {
                    b.merge(&build(m.len, G, &s));
                    s.iter().for_each(|(a, l)| m.set(Span::new(*a, *l)));
                }
                Op::Take => {
                    let t = b.take();
                    check(&t, &m);
                    m.edges.clear();
                }
            }
            check(&b, &m);
        }
    }

    #[test]
    fn bits_survive_the_stored_form(
        spans in prop::collection::vec((0u64..900 * G, 0..50 * G), 0..8),
        more in prop::collection::vec((0u64..900 * G, 0..50 * G), 0..8),
        cut in 0usize..125,
    ) {
        let b = build(1000 * G - 7, G, &spans);
        let all = Span::new(0, b.len());
        let (mut bytes, mut parts) = (vec![0xffu8; 127], vec![0xffu8; 127]);
        b.export_bits(0, &mut bytes);
        for (g, bit) in (0..1016u64).map(|g| (g, bytes[g as usize / 8] >> (g % 8) & 1 == 1)) {
            assert_eq!(bit, b.get(g * G), "granule {g}");
        }
        b.export_bits(0, &mut parts[..cut]);
        b.export_bits(cut as u64, &mut parts[cut..]);
        assert_eq!(parts, bytes);
        let mut again = build(1000 * G - 7, G, &more);
        let mut merged = again.clone();
        merged.merge(&b);
        again.import_bits(0, &bytes[..cut]);
        // nothing past the end is taken
        bytes.resize(200, 0xff);
        bytes[125..].fill(0xff);
        again.import_bits(cut as u64, &bytes[cut..]);
        assert_eq!(merged.areas(all, 0).collect::<Vec<_>>(), again.areas(all, 0).collect::<Vec<_>>());
        assert_eq!(merged.count(), again.count());
    }

    #[test]
    fn what_another_lacks_is_found(
        ours in prop::collection::vec((0u64..900 * G, 0..50 * G), 0..8),
        theirs in prop::collection::vec((0u64..900 * G, 0..200 * G), 0..8),
        len in 0u64..1000 * G,
        (start, bytes) in (0u64..1000 * G, 0..300 * G),
    ) {
        let (b, other) = (build(1000 * G - 7, G, &ours), build(len, G, &theirs));
        let at = Span::new(start, bytes).intersect(&Span::new(0, b.len()));
        let lacks = |g: &u64| b.get(g * G) && !(g * G < len && other.get(g * G));
        let first = (at.start / G..at.end().div_ceil(G)).filter(|_| !at.is_empty()).find(lacks);
        assert_eq!(b.next_beyond(&other, at), first.map(|g| (g * G).max(at.start)));
    }
}

#[test]
fn granularity_is_checked() {
    for bad in [0, 3, 256, 1 << 32, 1 << 63] {
        assert!(Bitmap::new(1 << 20, bad).is_err(), "{bad}");
    }
    assert!(Bitmap::new(u64::MAX, 512).unwrap_err().message().contains("cannot cover"));
    assert!(Bitmap::new(0, 512).unwrap().next_dirty(0).is_none());
}

/// Where chunks, inner levels and groups meet.
#[test]
fn the_stored_form_across_borders() {
    let g = 512;
    for border in [1u64 << 12, 1 << 18, 1 << 24, 1 << 25] {
        let len = ((1 << 25) + 1000) * g;
        let mut b = Bitmap::new(len, g).unwrap();
        b.set(Span::new((border - 70) * g, 3 * g));
        b.set(Span::new((border - 9) * g, 140 * g));
        // a whole chunk
        b.set(Span::new(0, g << 12));
        for first in [border - 128, border - 72] {
            let mut bytes = [0; 41];
            b.export_bits(first / 8, &mut bytes);
            let mut again = Bitmap::new(len, g).unwrap();
            again.import_bits(first / 8, &bytes);
            for i in 0..41 * 8 {
                assert_eq!(again.get((first + i) * g), b.get((first + i) * g), "{border}: {first} + {i}");
            }
            let within = Span::new(first * g, 41 * 8 * g);
            assert_eq!(b.next_beyond(&again, within), None);
            assert_eq!(again.next_beyond(&b, Span::new(0, len)), None);
            assert_eq!(again.count(), b.count_in(within));
        }
    }
}

/// 64 TiB at 64 KiB with 5000 scattered dirty granules: each whole-bitmap operation is done hundreds of times in the
/// time that anything linear in the disk's length (2^30 bits) would need for a few.
#[test]
fn huge_sparse_bitmap_costs_what_is_dirty() {
    let len = 64u64 << 40;
    let mut b = Bitmap::new(len, 65536).unwrap();
    (0..5000u64).for_each(|i| b.set(Span::new(i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % len, 1)));
    let t = std::time::Instant::now();
    let mut sum = 0;
    for _ in 0..50 {
        let mut c = Bitmap::new(len, 65536).unwrap();
        c.merge(&b);
        sum += c.areas(Span::new(0, len), 0).count();
        c.clear_all();
        c.set_all();
        assert_eq!(c.dirty_bytes(), len);
    }
    assert!(sum >= 50 * 4900);
    assert!(t.elapsed().as_secs() < 5, "{:?}", t.elapsed());
    println!("64 TiB, 5000 dirty: new+merge+iterate+clear+set_all {:?} each", t.elapsed() / 50);
}

#[test]
fn disabled_bitmaps_record_nothing() {
    let d = DirtyBitmap::new(Some("b".into()), 1 << 20, 65536).unwrap();
    d.record(Span::new(70000, 1));
    d.set_enabled(false);
    d.record(Span::new(0, 1));
    assert_eq!(d.bits().areas(Span::new(0, 1 << 20), 0).collect::<Vec<_>>(), [Span::new(65536, 65536)]);
    d.set_inconsistent();
    assert!(!d.enabled() && d.inconsistent());
}
