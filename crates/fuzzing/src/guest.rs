//! A guest's rings with anything in them, and anything in the log of requests in flight.
//!
//! What must stay true: no buffer outside of the guest's memory, no request twice, no end of requests that never comes.

use exports::testing::{Rings, Trial};

/// Bytes that say how the rings lie.
const HEAD: usize = 8;

thread_local! {
    static RINGS: block::Result<Rings> = Rings::new();
}

/// Any rings.
pub(crate) fn rings(bytes: &[u8]) {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else { return };
    let [how, size_low, size_high, a, b, c, d, log] = *head;
    let (log, memory) = rest.split_at(usize::from(log).min(rest.len()));
    let trial = Trial {
        packed: how & 1 != 0,
        event_idx: how & 2 != 0,
        size: u16::from_le_bytes([size_low, size_high]),
        base: u32::from_le_bytes([a, b, c, d]),
        memory,
        log: (how & 4 != 0).then_some(log),
    };
    RINGS.with(|rings| match rings {
        Ok(rings) => {
            if let Err(e) = rings.attempt(&trial) {
                panic!("{trial:?}: {e}");
            }
        }
        Err(e) => panic!("no memory to share: {e}"),
    });
}
