//! Before the first checkpoint: the primary's changes go to the disks themselves, with either engine. There is no image that they
//! could spoil, nobody is shown anything, and a group of any size is brought over with the smallest store.
//!
//! What can happen: a crash or a broken session in the middle, after which the next begins from nothing; a change behind the mark of the
//! first checkpoint before that is decided. What must stay true: the disks are flushed before the first epoch counts as prepared; once
//! it is prepared, what comes goes where its engine keeps it, so that the disks stay that checkpoint; as long as this process lives
//! it is known where the disks were touched, since they may be those of a former owner, which need not be sent everything.

use super::map::RangeMap;
use super::{Change, Layer, Role, State, Store};
use bitmap::Bitmap;
use block::{Result, Span};

/// Bytes that one mark stands for.
const EXTENT: u64 = 1 << 20;

/// Where the disks were touched: a map for each volume.
#[derive(Default)]
pub(super) struct Touched(Vec<Bitmap>);

impl Touched {
    fn mark(&mut self, lens: &[u64], volume: u16, at: Span) -> Result<()> {
        if self.0.is_empty() {
            self.0 = lens.iter().map(|len| Bitmap::new(*len, EXTENT)).collect::<Result<_>>()?;
        }
        if let Some(bits) = self.0.get_mut(usize::from(volume)) {
            if bits.len() < at.end() {
                bits.resize(at.end())?;
            }
            bits.set(at);
        }
        Ok(())
    }

    /// Volumes and ranges.
    pub(super) fn ranges(&self) -> Vec<(u16, Span)> {
        let of = |(v, bits): (usize, &Bitmap)| {
            let v = u16::try_from(v).unwrap_or(u16::MAX);
            bits.areas(Span::new(0, bits.len()), 0).map(|at| (v, at)).collect::<Vec<_>>()
        };
        self.0.iter().enumerate().flat_map(of).collect()
    }
}

impl State {
    /// Whether what comes now belongs to the first checkpoint.
    pub(super) fn is_blank(&self) -> bool {
        let begun = |l: &Layer| l.sealed.is_some() || !l.is_empty();
        self.role == Role::Secondary
            && self.history.now().is_none()
            && self.layers.len() == 1
            && !self.layers.iter().any(begun)
    }

    /// Undo: a session broke off after the mark of the first checkpoint. What it preserved leads back to nothing that is needed.
    pub(super) fn forget_first(&mut self, volumes: usize) {
        let maps: Vec<RangeMap> = self.layers.drain(..).flat_map(|l| l.maps).collect();
        self.garbage.extend(maps);
        self.layers.push_back(Layer::new(volumes));
    }
}

impl Store {
    /// The disks may hold `changes` from now on.
    pub(super) fn touch(&self, changes: &[Change]) -> Result<()> {
        let mut s = self.state.borrow_mut();
        if s.history.now().is_some() {
            return Ok(());
        }
        let lens = self.disk_lens();
        changes.iter().try_for_each(|c| s.touched.mark(&lens, c.volume, c.at))
    }
}
