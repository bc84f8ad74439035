//! Rewriting the parts of a header that are longer than one sector: backing name, extensions.
//!
//! A power cut may mix the sectors of a write, so the change is made by one sector, the first, and everything else that the
//! new header consists of is in the file before, where the old one has nothing. What must stay true: after every subset of
//! the sectors written since the last barrier the file has the old header or the new one, and nothing between; nobody else
//! writes to the first sector meanwhile.

use crate::core::Core;
use crate::header::{Extension, Header, backing_place, extensions_end, set_backing_place};
use block::{Data, Result, Span};
use env::bugs::planted;
use std::ops::Range;
use std::rc::Rc;

/// What is written in one piece or not at all.
const SECTOR: usize = 512;

/// Most that an extension with a backing format takes: left free behind the others, so that one that is added later does not
/// run into the name.
const FORMAT_ROOM: usize = 24;

/// Writes with a barrier behind each group; inside a group the order does not matter.
pub type Groups = Vec<Vec<(u64, Vec<u8>)>>;

/// How the header `old`, of which the file has `first` (its first cluster), becomes `new`. Both describe the same image; they differ
/// in backing name and extensions.
///
/// If neither header's extensions leave room for that in the first sector (a very long name of a data file), the header is
/// one write over several sectors.
///
/// # Errors
/// If the new header does not fit in a cluster or a name is too long.
pub fn plan(first: &[u8], old: &Header, new: &Header) -> Result<Groups> {
    let cluster = new.geometry.cluster_size() as usize;
    if let Some(groups) = careful(first, old, new, cluster)? {
        return Ok(groups);
    }
    let names = |e: &Extension| matches!(e, Extension::FeatureNames(_));
    if new.extensions.iter().any(names) {
        // the table of feature names is for people; without it there may be room
        let mut less = new.clone();
        less.extensions.retain(|e| !names(e));
        if let Some(groups) = careful(first, old, &less, cluster)? {
            return Ok(groups);
        }
    }
    let mut whole = new.encode()?;
    whole.resize(first.len().max(whole.len()).min(cluster), 0);
    Ok(vec![vec![(0, whole)]])
}

fn careful(first: &[u8], old: &Header, new: &Header, cluster: usize) -> Result<Option<Groups>> {
    let mut front = new.encode_front()?;
    let name = new.backing_name()?.unwrap_or_default().as_bytes();
    if front.len() + name.len() > cluster {
        return Err(new.too_long(front.len() + name.len()));
    }
    let old_name = backing_place(first);
    let old_end = extensions_end(first, old);
    let in_one = front.len() + name.len() <= SECTOR.min(cluster);
    let Some(at) = place_for(name.len(), &front, &old_name, in_one, cluster) else { return Ok(None) };
    if !name.is_empty() {
        set_backing_place(&mut front, at as u64, name.len() as u32);
    }
    let mut groups = Groups::new();
    // What the new header has behind the first sector must not be read as part of the old one.
    let tail = front.get(SECTOR..).unwrap_or_default().to_vec();
    let same_tail = old_end == front.len() && first.get(SECTOR..front.len()) == Some(&tail[..]);
    if !tail.is_empty() && !same_tail {
        if overlap(&(SECTOR..front.len()), &old_name) {
            return Ok(None);
        }
        if old_end > SECTOR {
            let Some(short) = shortened(old, &old_name)? else { return Ok(None) };
            groups.push(vec![(0, short)]);
        }
    }
    let mut ahead = Vec::new();
    if !tail.is_empty() && !same_tail {
        ahead.push((SECTOR as u64, tail));
    }
    if !name.is_empty() && !in_one {
        ahead.push((at as u64, name.to_vec()));
    }
    if !ahead.is_empty() {
        groups.push(ahead);
    }
    let used = if in_one { front.len()..front.len() } else { at..at + name.len() };
    let ends = front.len();
    front.truncate(SECTOR);
    if in_one {
        front.extend_from_slice(name);
    }
    front.resize(SECTOR.min(cluster), 0);
    groups.push(vec![(0, front)]);
    let rest = leftovers(&old_name, old_end, ends, &used);
    if !rest.is_empty() {
        groups.push(rest);
    }
    Ok(Some(groups))
}

/// Where the name goes: directly behind a header that is one sector with it, else behind the first sector, where the old name is
/// not.
fn place_for(
    len: usize,
    front: &[u8],
    old_name: &Range<usize>,
    in_one: bool,
    cluster: usize,
) -> Option<usize> {
    if in_one || len == 0 {
        return Some(front.len());
    }
    let first = (front.len() + FORMAT_ROOM).max(SECTOR);
    [first, old_name.end.max(first), front.len().max(SECTOR)]
        .into_iter()
        .find(|at| at + len <= cluster && !overlap(&(*at..at + len), old_name))
}

/// The old header in one sector, without the table of feature names, if that is possible. Its backing name stays where it is.
fn shortened(old: &Header, old_name: &Range<usize>) -> Result<Option<Vec<u8>>> {
    let mut less = old.clone();
    less.extensions.retain(|e| !matches!(e, Extension::FeatureNames(_)));
    let mut front = less.encode_front()?;
    if front.len() > SECTOR || (!old_name.is_empty() && old_name.start < SECTOR) {
        return Ok(None);
    }
    if !old_name.is_empty() {
        set_backing_place(&mut front, old_name.start as u64, old_name.len() as u32);
    }
    front.resize(SECTOR, 0);
    Ok(Some(front))
}

/// What the old header had and the new one has not, behind the first sector: as zeroes.
fn leftovers(
    old_name: &Range<usize>,
    old_end: usize,
    new_end: usize,
    new_name: &Range<usize>,
) -> Vec<(u64, Vec<u8>)> {
    let mut out = Vec::new();
    let mut clear = |r: Range<usize>| {
        let from = r.start.max(SECTOR).max(new_end);
        // in front of the new name and behind it
        for part in [from..r.end.min(new_name.start), from.max(new_name.end)..r.end] {
            let part = if new_name.is_empty() { from..r.end } else { part };
            if !part.is_empty() {
                out.push((part.start as u64, vec![0; part.len()]));
            }
            if new_name.is_empty() {
                break;
            }
        }
    };
    clear(old_name.clone());
    clear(SECTOR..old_end);
    out
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    !a.is_empty() && !b.is_empty() && a.start < b.end && b.start < a.end
}

impl Core {
    /// Changes backing name or extensions of the header, durably and at once. Runs to its end once begun: call it detached.
    pub(crate) async fn rewrite_header(self: &Rc<Self>, change: impl Fn(&mut Header)) -> Result<()> {
        self.check_writable()?;
        if !planted("stream: the header goes before the disk is flushed") {
            self.commit().await?;
        }
        let _turn = self.heading.turn(0).await;
        let old = self.header.borrow().clone();
        let mut new = old.clone();
        change(&mut new);
        let first = self.file.read(Span::new(0, self.geo.cluster_size())).await?.contiguous();
        let groups = plan(&first, &old, &new)?;
        let decisive = groups.iter().rposition(|g| g.iter().any(|(at, _)| *at == 0));
        for (i, group) in groups.into_iter().enumerate() {
            let mut written = Ok(());
            for (at, bytes) in group {
                written = self.file.write(at, Data::copy_from(&bytes)).await;
                if written.is_err() {
                    break;
                }
            }
            written?;
            if Some(i) == decisive {
                // whether or not the barrier works, this is what a reader of the file finds
                change(&mut self.header.borrow_mut());
            }
            self.file.barrier().await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// The first cluster of an image that QEMU made.
    fn made(options: &str, backing: Option<&str>) -> Vec<u8> {
        let n = std::sync::atomic::AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "liveblk-rewrite-{}-{:?}-{}.qcow2",
            std::process::id(),
            std::thread::current().id(),
            n.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        ));
        let mut c = Command::new("qemu-img");
        c.args(["create", "-q", "-u", "-f", "qcow2", "-o", options]);
        if let Some(b) = backing {
            c.args(["-b", b, "-F", "qcow2"]);
        }
        assert!(c.arg(&path).arg("1M").status().expect("qemu-img is installed").success());
        let bytes = std::fs::read(&path).expect("it made the file");
        std::fs::remove_file(&path).expect("it is there");
        let cluster = crate::header::first_cluster_len(&bytes).expect("an image") as usize;
        bytes[..cluster].to_vec()
    }

    type Names = (Option<String>, Option<String>);

    fn names(h: &Header) -> Names {
        (h.backing.clone(), h.backing_format().map(str::to_owned))
    }

    fn names_features(first: &[u8]) -> bool {
        let h = Header::parse(first).expect("sound");
        h.extensions.iter().any(|e| matches!(e, Extension::FeatureNames(_)))
    }

    fn without_format_and_names(h: &Header) -> Vec<Extension> {
        let ours = |e: &&Extension| !matches!(e, Extension::BackingFormat(_) | Extension::FeatureNames(_));
        h.extensions.iter().filter(ours).cloned().collect()
    }

    /// Every subset of the sectors of each group, in front of which everything is in the file.
    fn states(first: &[u8], groups: &Groups) -> Vec<Vec<u8>> {
        let mut now = first.to_vec();
        let mut out = vec![now.clone()];
        for group in groups {
            let mut sectors: Vec<(usize, Vec<u8>)> = Vec::new();
            for (at, bytes) in group {
                let (mut at, mut left) = (*at as usize, &bytes[..]);
                while !left.is_empty() {
                    let n = left.len().min(SECTOR - at % SECTOR);
                    sectors.push((at, left[..n].to_vec()));
                    (at, left) = (at + n, &left[n..]);
                }
            }
            assert!(sectors.len() <= 12, "{} sectors", sectors.len());
            for subset in 0..1u32 << sectors.len() {
                let mut torn = now.clone();
                for (i, (at, bytes)) in sectors.iter().enumerate() {
                    if subset >> i & 1 == 1 {
                        torn[*at..at + bytes.len()].copy_from_slice(bytes);
                    }
                }
                out.push(torn);
            }
            for (at, bytes) in sectors {
                now[at..at + bytes.len()].copy_from_slice(&bytes);
            }
        }
        out.push(now);
        out
    }

    /// Rewrites `first`, looks at every state a power cut could leave, and gives the last one.
    fn rewritten(first: &[u8], to: (Option<&str>, Option<&str>)) -> Vec<u8> {
        let old = Header::parse(first).expect("sound");
        let mut new = old.clone();
        new.set_backing(to.0, to.1);
        let groups = plan(first, &old, &new).expect("it fits");
        let all = states(first, &groups);
        for (i, state) in all.iter().enumerate() {
            let h = Header::parse(state).unwrap_or_else(|e| panic!("state {i} of {}: {e}", all.len()));
            assert!(names(&h) == names(&old) || names(&h) == names(&new), "state {i}: {:?}", names(&h));
            assert_eq!(without_format_and_names(&h), without_format_and_names(&old), "state {i}");
            assert_eq!((h.l1_offset, h.size, h.incompatible), (old.l1_offset, old.size, old.incompatible));
        }
        let last = all.last().expect("at least the old one").clone();
        assert_eq!(names(&Header::parse(&last).expect("checked")), names(&new));
        last
    }

    #[test]
    fn every_torn_state_is_the_old_header_or_the_new() {
        let long = "/a/".repeat(160);
        for options in
            ["compat=1.1", "compat=0.10", "compat=1.1,cluster_size=4k", "compat=1.1,cluster_size=512"]
        {
            let tiny = options.ends_with("=512");
            for backing in [None, Some("/some/where/base.qcow2")] {
                let backing = backing.filter(|_| !tiny);
                let mut first = made(options, backing);
                if tiny {
                    // no room for the table of names and anything else in such a cluster
                    let mut h = Header::parse(&first).expect("sound");
                    h.extensions.clear();
                    let len = first.len();
                    first = h.encode().expect("short");
                    first.resize(len, 0);
                }
                let had_names = names_features(&first);
                let long = if tiny { "a-name" } else { &long };
                for to in [
                    (Some("b.raw"), Some("raw")),
                    (Some(long), Some("qcow2")),
                    (Some("/another/name"), Some("host_device")),
                    (Some("x"), None),
                    (None, None),
                    (Some(long), None),
                    (Some("nbd+unix:///e?socket=/s"), Some("nbd")),
                    (None, None),
                    (Some("c"), Some("qcow2")),
                ] {
                    first = rewritten(&first, to);
                }
                assert_eq!(names_features(&first), had_names, "{options} {backing:?}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let first = made("compat=1.1,cluster_size=512,extended_l2=off", None);
        let old = Header::parse(&first).expect("sound");
        let mut new = old.clone();
        new.set_backing(Some(&"n".repeat(600)), Some("raw"));
        let e = plan(&first, &old, &new).expect_err("600 bytes in 512");
        assert!(e.message().contains("a cluster has 512"), "{e}");
        new.set_backing(Some(&"n".repeat(1024)), None);
        assert!(plan(&first, &old, &new).expect_err("too long").message().contains("too long"));
    }
}
