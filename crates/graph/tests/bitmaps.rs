//! Changes of dirty bitmaps, committed and taken back in groups while a guest writes, against sets of granules.

#![allow(clippy::unwrap_used, reason = "tests")]

use block::{Data, ReqFlags};
use drivers::null::{NullNode, NullOptions};
use env::Env;
use env::os::{OsConfig, start};
use graph::bitmaps::{self, BitmapChange, NewBitmap};
use graph::{Demand, Edge, Graph, NodeCell, NodeOptions, Parent, Perms, Role};
use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::rc::Rc;

const LEN: u64 = 1 << 20;
const GRANULE: u64 = 4096;

fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(Env) -> F) {
    let executor = start(OsConfig::default());
    let env = executor.env();
    executor.run(test(env));
}

async fn disk(env: &Env) -> (Rc<Graph>, Rc<NodeCell>, Rc<Edge>) {
    let graph = Graph::new(env);
    let node = NullNode::open(env, NullOptions { size: LEN, ..NullOptions::default() });
    let options = NodeOptions { name: Some("n".into()), monitor_owned: true, ..NodeOptions::default() };
    let cell = graph.add(options, node).await.unwrap();
    let demand = Demand { needs: Perms::WRITE, shares: Perms::ALL };
    let parent = Parent::Backend("guest".to_owned());
    let edge = graph.attach(&cell, "root", Role::Root, parent, demand).await.unwrap();
    (graph, cell, edge)
}

fn new(name: &str) -> NewBitmap {
    NewBitmap { name: name.into(), granularity: Some(GRANULE), persistent: false, disabled: false }
}

/// What a bitmap should hold.
#[derive(Clone, Default, PartialEq, Debug)]
struct Model {
    dirty: BTreeSet<u64>,
    enabled: bool,
    leaving: bool,
}

type Models = BTreeMap<String, Model>;

fn actual(cell: &NodeCell) -> Models {
    let mut all = Models::new();
    for b in cell.bitmaps().iter().filter(|b| b.name().is_some()) {
        let bits = b.bits();
        let dirty = (0..LEN / GRANULE).filter(|g| bits.get(g * GRANULE)).collect();
        let model = Model { dirty, enabled: b.enabled(), leaving: b.busy() };
        all.insert(b.name().unwrap().to_owned(), model);
    }
    all
}

/// One change to the models, if it is allowed there.
fn expect(m: &mut Models, verb: u64, name: &str, other: &str) -> bool {
    if verb == 0 {
        let free = !m.contains_key(name);
        if free {
            m.insert(name.to_owned(), Model { enabled: true, ..Model::default() });
        }
        return free;
    }
    let source = m.get(other).filter(|o| !o.leaving).map(|o| o.dirty.clone());
    let Some(b) = m.get_mut(name).filter(|b| !b.leaving) else { return false };
    match (verb, source) {
        (1, _) => b.leaving = true,
        (2, _) => b.dirty.clear(),
        (3, _) => b.enabled = true,
        (4, _) => b.enabled = false,
        (_, Some(more)) => b.dirty.extend(more),
        (_, None) => return false,
    }
    true
}

async fn change(cell: &Rc<NodeCell>, verb: u64, name: &str, other: &str) -> block::Result<BitmapChange> {
    match verb {
        0 => bitmaps::add(cell, &new(name)).await,
        1 => bitmaps::remove(cell, name).await,
        2 => bitmaps::clear(cell, name),
        3 | 4 => bitmaps::set_enabled(cell, name, verb == 3),
        _ => {
            let source = bitmaps::find_bitmap(cell, other)?;
            bitmaps::merge(cell, name, &[(cell.clone(), source)])
        }
    }
}

#[test]
fn groups_of_changes_leave_what_they_should() {
    let seed = std::env::var("LIVEBLK_SEED").map_or_else(|_| 7, |s| s.parse().unwrap());
    println!("LIVEBLK_SEED={seed}");
    run(move |env| async move {
        let (_graph, cell, edge) = disk(&env).await;
        let mut x: u64 = seed;
        let mut random = move |n: u64| {
            x = (x ^ x << 13 ^ 0x9e37_79b9).wrapping_mul(0x2545_f491_4f6c_dd1d);
            (x >> 33) % n
        };
        let names = ["a", "b", "c"];
        let mut models = Models::new();
        for round in 0..2000 {
            // What is there if the group is taken back: as before, and what is written meanwhile to what recorded before.
            let (mut back, mut made) = (models.clone(), Vec::new());
            for _ in 0..random(6) {
                let (verb, name, other) = (random(6), names[random(3) as usize], names[random(3) as usize]);
                let fits = expect(&mut models, verb, name, other);
                let result = change(&cell, verb, name, other).await;
                assert_eq!(result.is_ok(), fits, "round {round}: {verb} {name} {other}");
                made.extend(result);
                let granule = random(LEN / GRANULE);
                edge.write(granule * GRANULE + 7, Data::zeroes(5), ReqFlags::NONE).await.unwrap();
                for m in models.values_mut().chain(back.values_mut()).filter(|m| m.enabled) {
                    m.dirty.insert(granule);
                }
                assert_eq!(actual(&cell), models, "round {round}");
            }
            if random(2) == 0 {
                made.into_iter().rev().for_each(BitmapChange::undo);
                models = back;
            } else {
                made.into_iter().for_each(BitmapChange::commit);
                models.retain(|_, m| !m.leaving);
            }
            assert_eq!(actual(&cell), models, "after round {round}");
            let unnamed = cell.bitmaps().iter().filter(|b| b.name().is_none()).count();
            assert_eq!(unnamed, 0, "a recorder was left behind");
        }
    });
}

#[test]
fn what_is_in_use_or_unfit_is_refused() {
    run(|env| async move {
        let (_graph, cell, _edge) = disk(&env).await;
        bitmaps::add(&cell, &new("b")).await.unwrap().commit();
        bitmaps::add(&cell, &new("ok")).await.unwrap().commit();
        let b = cell.find_bitmap("b").unwrap();
        let ok = cell.find_bitmap("ok").unwrap();
        let said = |r: block::Result<BitmapChange>| match r {
            Err(e) => e.message().to_owned(),
            Ok(change) => {
                change.undo();
                "done".to_owned()
            }
        };
        let merge = |t: &str, s: &Rc<bitmap::DirtyBitmap>| {
            said(bitmaps::merge(&cell, t, &[(cell.clone(), s.clone())]))
        };
        let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
        b.set_busy(true);
        assert_eq!(said(bitmaps::clear(&cell, "b")), busy);
        assert_eq!(said(bitmaps::remove(&cell, "b").await), busy);
        assert_eq!(said(bitmaps::set_enabled(&cell, "b", false)), busy);
        assert_eq!((merge("b", &ok), merge("ok", &b)), (busy.into(), busy.into()));
        b.set_busy(false);
        let readonly = "Bitmap 'b' is readonly and cannot be modified";
        b.set_readonly(true);
        assert_eq!(said(bitmaps::clear(&cell, "b")), readonly);
        assert_eq!(said(bitmaps::remove(&cell, "b").await), readonly);
        assert_eq!(said(bitmaps::set_enabled(&cell, "b", false)), "done");
        assert_eq!((merge("b", &ok), merge("ok", &b)), (readonly.into(), "done".into()));
        b.set_readonly(false);
        let unfit = "Bitmap 'b' is inconsistent and cannot be used";
        b.set_inconsistent();
        assert_eq!(said(bitmaps::clear(&cell, "b")), unfit);
        assert_eq!(said(bitmaps::set_enabled(&cell, "b", true)), unfit);
        assert_eq!((merge("b", &ok), merge("ok", &b)), (unfit.into(), unfit.into()));
        assert_eq!(said(bitmaps::remove(&cell, "b").await), "done");
        assert_eq!(
            said(bitmaps::add(&cell, &NewBitmap { persistent: true, ..new("p") }).await),
            "Can't store persistent bitmaps to n: Operation not supported"
        );
        bitmaps::merge(&cell, "ok", &[]).unwrap().commit();
    });
}
