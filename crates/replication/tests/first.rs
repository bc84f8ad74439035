//! What a secondary's disks get before it is decided. The first checkpoint: what leads to it goes to the disks themselves, in a store smaller than what comes; what comes behind its
//! mark does not spoil it.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{Data, Span};
use common::{commit, prepare};
use env::{Env, OpenMode};
use replication::bugs::{Bug, plant};
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, MIN_SIZE, NewStore, Store, Volume};
use replication::{Epoch, Generation, GroupId};
use sim::{Fault, Host, Image, Keep, Op, Rule, World};
use std::path::Path;
use std::rc::Rc;

/// Twice what the smallest store takes.
const LEN: u64 = 2 * MIN_SIZE;
const PIECE: u64 = 1 << 20;

async fn open(env: &Env) -> Rc<Store> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let disk: Rc<dyn Volume> = Rc::new(FileVolume(env.open(Path::new("/disk"), mode).await.unwrap()));
    let file = env.open(Path::new("/store"), mode).await.unwrap();
    Store::open(env, file, vec![disk]).await.unwrap()
}

fn everything(fill: u8) -> impl Iterator<Item = Change> {
    let piece = move |at: Span| Change { volume: 0, at, data: Data::from(vec![fill; at.len as usize]) };
    Span::new(0, LEN).pieces(PIECE).map(piece)
}

fn history(epoch: u64) -> History {
    let mut h = History::begin(Generation(1));
    h.advance(Epoch(epoch));
    h
}

async fn is_all(store: &Store, fill: u8) -> bool {
    let seen = store.read(0, Span::new(0, LEN)).await.unwrap().to_vec();
    seen.iter().all(|b| *b == fill)
}

fn raw(host: &Host) -> Vec<u8> {
    host.image("/disk").unwrap().read(Span::new(0, LEN))
}

/// The whole disk, the mark, a change behind it, the decision; then the power fails and nothing survives that was not durable. What is
/// wrong then.
fn first_checkpoint(engine: Engine) -> Option<String> {
    World::play(1, false, |w| async move {
        w.host().install("/disk", Image::from_bytes(&vec![9; LEN as usize]));
        w.host().install("/store", Image::from_bytes(&[]));
        let (env, process) = w.start();
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = env.open(Path::new("/store"), mode).await.unwrap();
        let new = NewStore { group: GroupId::of_name("g"), engine, size: MIN_SIZE };
        Store::create(&file, &new, History::none()).await.unwrap();
        let store = open(&env).await;
        let room = store.room();
        // a session that breaks in the middle, after the mark, leaves nothing in the way of the next
        for session in 0..2 {
            store.begin(Generation(1), &[]).await.unwrap();
            for c in everything(1) {
                store.keep(&[c]).await.unwrap();
                assert!(store.room() + 4096 >= room, "the store does not fill up");
            }
            assert!(store.is_applied());
            assert_eq!(
                store.left_on_disk(),
                [(0, Span::new(0, LEN))],
                "a former owner's disk is touched there"
            );
            prepare(&store, Epoch(1), history(1)).await.unwrap();
            let behind = everything(2).next().unwrap();
            store.keep(&[behind]).await.unwrap();
            assert!(store.room() < room, "what comes behind the mark is kept where the engine keeps it");
            if session == 1 {
                commit(&store, Epoch(1)).await.unwrap();
            }
        }
        assert!(is_all(&store, 1).await, "I1: the view is the checkpoint");
        if engine == Engine::Redo {
            assert!(raw(w.host()).iter().all(|b| *b == 1), "I1: so is the disk");
        }
        drop(store);
        w.host().power_loss_keeping(&[&process], Keep::Nothing);
        let (env, _process) = w.start();
        let store = open(&env).await;
        assert_eq!(store.history().epoch(), Epoch(1));
        if !is_all(&store, 1).await {
            w.verdict().violation("I1: the checkpoint is not what was committed".to_owned());
        }
    })
    .violation
}

#[test]
fn a_first_synchronization_fits_into_any_store_and_its_checkpoint_is_durable() {
    for engine in [Engine::Redo, Engine::Undo] {
        assert_eq!(first_checkpoint(engine), None, "{engine:?}");
        plant(Some(Bug::DataNotFlushedBeforeCommit));
        let found = first_checkpoint(engine);
        plant(None);
        assert!(found.is_some(), "{engine:?}: the test cannot fail");
    }
}

/// A barrier of the log fails behind what was preserved: nothing is written over it afterwards, whatever comes.
#[test]
fn nothing_is_overwritten_whose_old_content_was_not_made_durable() {
    let outcome = World::play(1, false, |w| async move {
        w.host().install("/disk", Image::from_bytes(&vec![1; LEN as usize]));
        w.host().install("/store", Image::from_bytes(&[]));
        let (env, _process) = w.start();
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = env.open(Path::new("/store"), mode).await.unwrap();
        let new = NewStore { group: GroupId::of_name("g"), engine: Engine::Undo, size: MIN_SIZE };
        Store::create(&file, &new, history(1)).await.unwrap();
        let store = open(&env).await;
        store.begin(Generation(1), &[]).await.unwrap();
        w.host().fault(Rule::once("/store", Op::Barrier, Fault::Errno(block::BlockError::ENOSPC)));
        for at in [Span::new(0, 512), Span::new(1024, 512)] {
            let change = Change { volume: 0, at, data: Data::from(vec![2; 512]) };
            assert!(store.keep(&[change]).await.is_err(), "{at}");
        }
        assert!(raw(w.host()).iter().all(|b| *b == 1));
    });
    assert_eq!(outcome.violation, None);
}
