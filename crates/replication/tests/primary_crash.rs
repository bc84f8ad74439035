//! A primary whose power fails, with a secondary that has committed more than the primary's disk kept: what the disk lost is sent again
//! (I8), whatever moment of a write the failure hits.
#![allow(missing_docs, clippy::unwrap_used)]

use block::{Data, ReqFlags, Span};
use drivers::file::{FileNode, FileOptions};
use env::{Address, Env, Existing, OpenMode};
use graph::{Demand, Edge, Graph, NodeOptions, Parent, Perms, Role};
use replication::history::History;
use replication::primary::{Config, PeerState};
use replication::session::{Activity, DEFAULT_TIMEOUT, PrimaryGroup, SecondaryGroup};
use replication::store::{Engine, FileVolume, NewStore, Store, Volume};
use replication::{Generation, GroupId};
use sim::{Fault, Host, Image, Keep, Op, Profile, Rule, World};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// Two places with a mark of their own.
const HERE: Span = Span { start: 0, len: 4096 };
const ELSEWHERE: Span = Span { start: 8 << 20, len: 4096 };
const LEN: u64 = 16 << 20;
const PATIENCE: Duration = Duration::from_secs(60);
const UNDER_WAY: &str = "replication: what is under way counts as written";
const UNFLUSHED: &str = "replication: forgotten without a flush here";

fn group() -> GroupId {
    GroupId::of_name("g")
}

fn bytes(fill: u8) -> Data {
    Data::from(vec![fill; 4096])
}

/// The primary of the group on this host, new or after a crash.
async fn primary(env: &Env, new: bool) -> Rc<PrimaryGroup> {
    let graph = Graph::new(env);
    let options = FileOptions { filename: "/disk".to_owned(), ..FileOptions::default() };
    let node = FileNode::open(env, &options).await.unwrap().0;
    let cell =
        graph.add(NodeOptions { name: Some("disk".into()), ..NodeOptions::default() }, node).await.unwrap();
    let demand = Demand { needs: Perms::CONSISTENT_READ.with(Perms::WRITE), shares: Perms::ALL };
    let disk: Rc<Edge> = graph
        .attach_exact(&cell, "test", Role::Root, Parent::Job { kind: "mirror", id: "test".into() }, demand)
        .await
        .unwrap();
    let existing = if new { Existing::CreateNew } else { Existing::Open };
    let file = env.open(Path::new("/record"), OpenMode { write: true, existing, ..OpenMode::default() });
    let file = file.await.unwrap();
    let activity = if new {
        Activity::create(file, group(), &[LEN], History::begin(Generation(1)), Some(&[])).await.unwrap()
    } else {
        Activity::open(file, group(), &[LEN]).await.unwrap().expect("one slot is whole")
    };
    let tell = Rc::new(|_: &'static str, _| ());
    let primary =
        PrimaryGroup::new(env, group(), vec![disk], activity, Config::default(), DEFAULT_TIMEOUT, tell)
            .unwrap();
    primary.add_peer("s", Address::tcp("s", 7000));
    primary
}

async fn secondary(env: &Env) -> Rc<SecondaryGroup> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let file = env.open(Path::new("/store"), mode).await.unwrap();
    let new = NewStore { group: group(), engine: Engine::Undo, size: replication::store::MIN_SIZE };
    Store::create(&file, &new, History::none()).await.unwrap();
    let disk: Rc<dyn Volume> = Rc::new(FileVolume(env.open(Path::new("/disk"), mode).await.unwrap()));
    let store = Store::open(env, file, vec![disk]).await.unwrap();
    let s = SecondaryGroup::new(env, store, "/s.record".into(), Rc::new(|_: &'static str, _| ()));
    s.serve(env.listen(&Address::tcp("s", 7000)).await.unwrap());
    s
}

async fn until(env: &Env, mut there: impl FnMut() -> bool) {
    let waiting = async {
        while !there() {
            env.sleep(Duration::from_millis(10)).await;
        }
    };
    env.timeout(PATIENCE, waiting).await.expect("this never comes about");
}

async fn in_sync(env: &Env, p: &Rc<PrimaryGroup>) {
    until(env, || p.look(|c| c.peers()[0].state == PeerState::Running)).await;
}

/// A write that everybody but the primary's own disk has: still on its way to it, or not flushed. Its mark must survive the checkpoint.
fn power_fails(under_way: bool) -> Option<String> {
    World::play(1, false, |w| async move {
        let far = Host::new("s", w.machine(), w.net(), Profile::calm());
        for host in [w.host(), &far] {
            host.install("/disk", Image::from_bytes(&vec![0; LEN as usize]));
        }
        far.install("/store", Image::from_bytes(&[]));
        let (far_env, _far_process) = far.start(w.executor());
        let _s = secondary(&far_env).await;
        let (env, process) = w.start();
        let p = primary(&env, true).await;
        in_sync(&env, &p).await;
        if under_way {
            w.host().fault(Rule::once("/disk", Op::Write, Fault::Hang));
        }
        let (writer, before) = (p.clone(), p.look(|c| c.last()));
        let write = env.spawn("write", async move {
            writer.write(0, HERE, Some(bytes(1)), ReqFlags::default()).await.unwrap();
        });
        until(&env, || p.look(|c| c.last() > before && c.peers()[0].progress.received >= c.last())).await;
        until(&env, || under_way || write.is_done()).await;
        p.checkpoint(PATIENCE).await.unwrap();
        assert_eq!(write.is_done(), !under_way);
        // the next mark writes down what is forgotten
        env.sleep(Duration::from_millis(100)).await;
        p.write(0, ELSEWHERE, Some(bytes(2)), ReqFlags::default()).await.unwrap();
        w.host().power_loss_keeping(&[&process], Keep::Nothing);
        w.host().clear_faults();
        let (env, _process) = w.start();
        let p = primary(&env, false).await;
        in_sync(&env, &p).await;
        p.checkpoint(PATIENCE).await.unwrap();
        let (here, there) = (w.host().image("/disk").unwrap(), far.image("/disk").unwrap());
        for at in [HERE, ELSEWHERE] {
            if here.read(at) != there.read(at) {
                w.verdict().violation(format!(
                    "{at} is {} here and {} there",
                    here.read(at)[0],
                    there.read(at)[0]
                ));
            }
        }
    })
    .violation
}

#[test]
fn a_write_under_way_on_the_primary_that_all_others_committed_keeps_its_mark() {
    assert_eq!(power_fails(true), None);
    env::bugs::plant(Some(UNDER_WAY));
    let found = power_fails(true);
    env::bugs::plant(None);
    assert!(found.is_some(), "the test cannot fail");
}

#[test]
fn what_all_others_committed_is_forgotten_only_when_it_is_durable_on_the_primary() {
    assert_eq!(power_fails(false), None);
    env::bugs::plant(Some(UNFLUSHED));
    let found = power_fails(false);
    env::bugs::plant(None);
    assert!(found.is_some(), "the test cannot fail");
}
