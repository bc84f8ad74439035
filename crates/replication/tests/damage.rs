//! A bit of the store's file flips. Where the record was on stable storage before others were written, that is told, with the place;
//! it is never passed over for an older checkpoint. A tail that a crash tore off is no damage.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{Data, Span};
use common::{commit, prepare};
use env::{Env, OpenMode};
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, MIN_SIZE, NewStore, Store};
use replication::{Epoch, Generation, GroupId};
use sim::{Image, World};
use std::path::Path;
use std::rc::Rc;

/// Where records begin in the file: behind the two slots of 128 KiB.
const RING_START: u64 = 256 << 10;
/// The record of the first session lies before the log's beginning when that session has begun.
const TAIL: u64 = 64;

fn write() -> OpenMode {
    OpenMode { write: true, ..OpenMode::default() }
}

async fn open(env: &Env) -> block::Result<Rc<Store>> {
    let disk = env.open(Path::new("/disk"), write()).await?;
    let file = env.open(Path::new("/store"), write()).await?;
    Store::open(env, file, vec![Rc::new(FileVolume(disk))]).await
}

#[test]
fn a_flipped_bit_in_what_was_committed_is_told_with_its_place() {
    for engine in [Engine::Redo, Engine::Undo] {
        let outcome = World::play(1, false, move |w| async move {
            w.host().install("/disk", Image::from_bytes(&vec![9; 1 << 20]));
            w.host().install("/store", Image::from_bytes(&[]));
            let (env, process) = w.start();
            let file = env.open(Path::new("/store"), write()).await.unwrap();
            let new = NewStore { group: GroupId::of_name("g"), engine, size: MIN_SIZE };
            Store::create(&file, &new, History::none()).await.unwrap();
            let store = open(&env).await.unwrap();
            store.begin(Generation(1), &[]).await.unwrap();
            let mut history = History::begin(Generation(1));
            // the end of the last record that was durable before another was written
            let mut proven = 0;
            for epoch in 1..=3u8 {
                let data = Data::from(vec![epoch; 3000]);
                let at = Span::new(u64::from(epoch) * 8192, 3000);
                store.keep(&[Change { volume: 0, at, data }]).await.unwrap();
                proven = TAIL + store.usage().used;
                history.advance(Epoch(u64::from(epoch)));
                prepare(&store, Epoch(u64::from(epoch)), history.clone()).await.unwrap();
                commit(&store, Epoch(u64::from(epoch))).await.unwrap();
            }
            let end = TAIL + store.usage().used;
            process.kill();
            let whole = w.host().image("/store").unwrap().read(Span::new(0, RING_START + MIN_SIZE)).to_vec();
            let mut told = 0;
            for at in (TAIL..end).step_by(64) {
                let mut bytes = whole.clone();
                bytes[(RING_START + at) as usize + (at / 64 % 64) as usize] ^= 0x10;
                w.host().install("/store", Image::from_bytes(&bytes));
                let (env, process) = w.start();
                match open(&env).await {
                    Err(e) => {
                        let e = e.to_string();
                        let place: u64 = e
                            .split("damaged at offset ")
                            .nth(1)
                            .unwrap_or_else(|| panic!("{e}"))
                            .split(':')
                            .next()
                            .unwrap()
                            .parse()
                            .unwrap();
                        assert!(place <= RING_START + at && RING_START + at < place + 8192, "{at}: {e}");
                        told += 1;
                    }
                    // padding carries nothing, and behind the last barrier nothing proves that there was a record
                    Ok(store) if at < proven => {
                        assert_eq!(
                            store.history().epoch(),
                            Epoch(3),
                            "{engine:?}: passed over in silence at {at}"
                        );
                    }
                    Ok(store) => assert!(store.history().epoch() >= Epoch(2), "{engine:?} at {at}"),
                }
                process.kill();
            }
            assert!(told > 100, "{engine:?}: {told}");
            // a torn tail: what no barrier covered may be anything
            let mut bytes = whole.clone();
            bytes[(RING_START + end) as usize..].fill(0xa5);
            w.host().install("/store", Image::from_bytes(&bytes));
            let (env, _process) = w.start();
            assert_eq!(open(&env).await.unwrap().history().epoch(), Epoch(3));
        });
        assert!(outcome.violation.is_none(), "{:?}", outcome.violation);
    }
}
