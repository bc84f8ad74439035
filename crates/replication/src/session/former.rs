//! Disks that are given up: an owner becomes the secondary of another, and need not be sent everything (L8).
//!
//! What must stay true: apart from the places named, the disks hold each checkpoint of the path from `since` on; for this every write
//! since then is among the places, and nothing is written between their being collected and the change of role.

use super::activity::{Activity, EXTENT};
use crate::history::History;
use crate::types::Epoch;
use crate::wire::{Doubt, MAX_DOUBT};
use bitmap::Bitmap;
use block::{Result, Span};

/// See above.
#[derive(Clone, Debug)]
pub struct Former {
    /// Where the image comes from, as far as it can have come.
    pub history: History,
    /// The places reach back to this checkpoint.
    pub since: Epoch,
    /// What was written since: volumes and ranges.
    pub places: Vec<(u16, Span)>,
}

impl Former {
    /// As the record of a former owner tells.
    pub fn recorded(record: &Activity) -> Former {
        let mut history = record.history();
        history.advance(record.used());
        Former { history, since: record.floor(), places: record.marks() }
    }
}

/// What a WELCOME says of disks of these lengths: of a former owner's, if they are that still, and of what a broken session left on them.
///
/// # Errors
/// A volume that is too long for a bitmap.
pub(super) fn doubt(lens: &[u64], former: Option<&Former>, left: &[(u16, Span)]) -> Result<Doubt> {
    let mut places: Vec<(u16, Span)> = former.map(|f| f.places.clone()).unwrap_or_default();
    places.extend_from_slice(left);
    if places.len() > MAX_DOUBT {
        // coarser
        let mut coarse: Vec<Bitmap> =
            lens.iter().map(|len| Bitmap::new(*len, EXTENT)).collect::<Result<_>>()?;
        for (volume, at) in &places {
            if let Some(bits) = coarse.get_mut(usize::from(*volume)) {
                bits.set(*at);
            }
        }
        places = ranges(&coarse);
    }
    let former = former.map(|f| (f.history.clone(), f.since));
    Ok(Doubt { former, places: (places.len() <= MAX_DOUBT).then_some(places) })
}

/// What bitmaps of volumes mark.
pub(crate) fn ranges(bitmaps: &[Bitmap]) -> Vec<(u16, Span)> {
    let of = |(v, bits): (usize, &Bitmap)| {
        let v = u16::try_from(v).unwrap_or(u16::MAX);
        bits.areas(Span::new(0, bits.len()), 0).map(|at| (v, at)).collect::<Vec<_>>()
    };
    bitmaps.iter().enumerate().flat_map(of).collect()
}
