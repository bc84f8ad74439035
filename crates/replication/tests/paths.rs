//! A secondary whose path forks: it has more than the one that took over, and goes back with it. It names the places in which it differs, and
//! offers no checkpoint of the path that it left.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use block::{Data, Span};
use common::{commit, prepare};
use env::{Env, OpenMode};
use replication::bugs::{Bug, plant};
use replication::history::History;
use replication::store::{Change, Engine, FileVolume, NewStore, Store, Volume};
use replication::{Epoch, Generation, GroupId};
use sim::{Image, World};
use std::path::Path;
use std::rc::Rc;

const PIECE: u64 = 64 << 10;
const PIECES: u64 = 16;

fn place(n: u64) -> Span {
    Span::new(n * PIECE, 4096)
}

async fn opened(env: &Env) -> Rc<Store> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let disk: Rc<dyn Volume> = Rc::new(FileVolume(env.open(Path::new("/disk"), mode).await.unwrap()));
    Store::open(env, env.open(Path::new("/store"), mode).await.unwrap(), vec![disk]).await.unwrap()
}

/// One epoch with one change in it.
async fn epoch(store: &Rc<Store>, history: &mut History, number: u64, piece: u64) {
    let data = Data::from(vec![number as u8; 4096]);
    store.keep(&[Change { volume: 0, at: place(piece), data }]).await.unwrap();
    history.advance(Epoch(number));
    prepare(store, Epoch(number), history.clone()).await.unwrap();
    commit(store, Epoch(number)).await.unwrap();
}

/// Which pieces were changed since, as the store says.
fn since(store: &Rc<Store>, epoch: u64) -> Option<Vec<u64>> {
    let places = store.changed_since(Epoch(epoch))?;
    Some((0..PIECES).filter(|n| places.iter().any(|(_, at)| at.intersect(&place(*n)) == place(*n))).collect())
}

/// What a secondary says and offers that went back from checkpoint 4 to 3, in the index and after it has left that.
fn forked(engine: Engine, retain: u64) -> Vec<u64> {
    let offered = Rc::new(std::cell::RefCell::new(Vec::new()));
    let seen = offered.clone();
    let outcome = World::play(1, false, move |w| async move {
        w.host().install("/disk", Image::from_bytes(&vec![0; (PIECES * PIECE) as usize]));
        w.host().install("/store", Image::from_bytes(&[]));
        let (env, process) = w.start();
        let mode = OpenMode { write: true, ..OpenMode::default() };
        let file = env.open(Path::new("/store"), mode).await.unwrap();
        let new = NewStore { group: GroupId::of_name("g"), engine, size: replication::store::MIN_SIZE };
        let mut history = History::begin(Generation(1));
        history.advance(Epoch(1));
        Store::create(&file, &new, history.clone()).await.unwrap();
        let store = opened(&env).await;
        store.set_retain(retain).await.unwrap();
        store.begin(Generation(1), &[]).await.unwrap();
        for n in 2..=4 {
            epoch(&store, &mut history, n, n).await;
            assert_eq!(since(&store, n - 1), Some(vec![n]), "it is in the index");
            store.tidy().await.unwrap();
        }
        assert_eq!(since(&store, 1), Some(vec![2, 3, 4]));
        assert_eq!(since(&store, 3), Some(vec![4]));
        assert_eq!(since(&store, 4), Some(vec![]));
        assert_eq!(since(&store, 0), None, "that was before the first checkpoint here");
        // another took over at 3
        let mut other = history.rewound(Epoch(3));
        other.promote(Generation(2), Epoch(3));
        store.begin(Generation(2), &[]).await.unwrap();
        epoch(&store, &mut other, 6, 4).await;
        assert_eq!(store.history(), other);
        assert_eq!(since(&store, 3), Some(vec![4]));
        *seen.borrow_mut() = store.checkpoints().iter().map(|e| e.0).collect();
        for _ in 0..2 {
            store.tidy().await.unwrap();
            let now: Vec<u64> = store.checkpoints().iter().map(|e| e.0).collect();
            assert!(now == *seen.borrow(), "{now:?}");
        }
        // what has left the index before the process ended nobody knows
        process.kill();
        let (env, _process) = w.start();
        let store = opened(&env).await;
        let known = since(&store, 3);
        assert!(known.is_none() || known == Some(vec![4]), "{known:?}");
        assert_eq!(since(&store, 6), Some(vec![]));
    });
    assert_eq!(outcome.violation, None);
    offered.take()
}

#[test]
fn who_goes_back_says_where_it_differs_and_offers_nothing_of_the_path_it_left() {
    for engine in [Engine::Redo, Engine::Undo] {
        assert_eq!(forked(engine, 0), [6], "{engine:?}");
        assert_eq!(forked(engine, 9), [1, 2, 3, 6], "{engine:?}: 4 was on the other path");
        plant(Some(Bug::OtherPathOffered));
        let offered = forked(engine, 9);
        plant(None);
        assert!(offered.contains(&4), "{offered:?}");
    }
}
