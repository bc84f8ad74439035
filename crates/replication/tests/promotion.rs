//! A promotion while much of a checkpoint is still on its way to the disk: it does not wait for that (X2), and nothing is lost by it.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{Data, Span};
use common::{commit, prepare};
use env::OpenMode;
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, NewStore, Role, Store, Volume};
use replication::{Epoch, Generation, GroupId};
use sim::{Image, World};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

const PIECES: u64 = 100;
const PIECE: u64 = 4096;
/// Each request to the disk takes that long: all of the checkpoint takes seconds.
const SLOW: Duration = Duration::from_millis(50);

fn place(n: u64) -> Span {
    Span::new(2 * n * PIECE, PIECE)
}

#[test]
fn a_promotion_does_not_wait_for_what_is_being_brought_to_the_disk() {
    let outcome = World::play(1, false, |w| async move {
        w.host().install("/disk", Image::from_bytes(&vec![0; (2 * PIECES * PIECE) as usize]));
        w.host().install("/store", Image::from_bytes(&[]));
        let (env, _process) = w.start();
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = env.open(Path::new("/store"), mode).await.unwrap();
        let size = replication::store::MIN_SIZE;
        let new = NewStore { group: GroupId::of_name("g"), engine: Engine::Redo, size };
        let mut history = History::begin(Generation(1));
        history.advance(Epoch(1));
        // the first checkpoint would not go through the log
        Store::create(&file, &new, history.clone()).await.unwrap();
        let disk: Rc<dyn Volume> = Rc::new(FileVolume(env.open(Path::new("/disk"), mode).await.unwrap()));
        let store = Store::open(&env, file, vec![disk]).await.unwrap();
        store.begin(Generation(1), &[]).await.unwrap();
        let data = Data::from(vec![7; PIECE as usize]);
        let all: Vec<Change> =
            (0..PIECES).map(|n| Change { volume: 0, at: place(n), data: data.clone() }).collect();
        store.keep(&all).await.unwrap();
        history.advance(Epoch(2));
        prepare(&store, Epoch(2), history).await.unwrap();
        commit(&store, Epoch(2)).await.unwrap();
        w.host().adjust(|p| (p.inline, p.latency) = (0.0, (SLOW, SLOW)));
        let bringing = store.clone();
        let task = env.spawn("tidy", async move { bringing.tidy().await.unwrap() });
        env.sleep(SLOW * 5).await;
        assert!(!task.is_done());
        let begun = env.now();
        store.promote(Generation(2), true).await.unwrap();
        let took = env.now() - begun;
        assert!(took < SLOW * 10, "it took {took:?}");
        let seen = store.read(0, place(PIECES - 1)).await.unwrap();
        assert!(seen.to_vec().iter().all(|b| *b == 7), "what is not on the disk yet is served");
        store.merge().await.unwrap();
        assert_eq!(store.role(), Role::Done);
        let image = w.host().image("/disk").unwrap();
        for n in 0..PIECES {
            assert!(image.read(place(n)).iter().all(|b| *b == 7), "piece {n} is not on the disk");
        }
    });
    assert_eq!(outcome.violation, None);
}
