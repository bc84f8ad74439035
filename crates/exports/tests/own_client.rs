//! Our client against our server: both roles of everything, at speed and with trouble.

#![allow(clippy::unwrap_used)]

#[path = "../../drivers/tests/storm/mod.rs"]
mod storm;
mod support;

use drivers::nbd_client::{NbdClient, NbdOptions};
use env::{Address, Env};
use exports::{DeleteMode, ServerOptions};
use graph::Node;
use std::rc::Rc;
use std::time::Duration;
use support::{Dir, Server, options};

const SIZE: usize = 4 << 20;

fn serve(dir: &Dir) -> (Server, Vec<u8>) {
    let content = dir.image("disk", SIZE, 6);
    let o = ServerOptions::at(Address::Unix(dir.path("s")));
    (Server::start(&dir.path("disk"), o, options("e", "d")), content)
}

fn with<T: 'static, F: Future<Output = T> + 'static>(f: impl FnOnce(Env) -> F) -> T {
    let e = env::os::start(env::os::OsConfig::default());
    let env = e.env();
    let limit = env.clone();
    let work = Box::pin(f(env));
    e.run(async move { limit.timeout(Duration::from_secs(60), work).await.expect("hangs") })
}

#[test]
fn random_requests_on_a_quick_and_a_slow_disk() {
    for delay in [Duration::ZERO, Duration::from_micros(300)] {
        let dir = Dir::new();
        let (server, before) = serve(&dir);
        server.call(move |s| async move { s.node.delay.set(delay) });
        let o = NbdOptions::new(Address::Unix(dir.path("s")), "d");
        let after = with(|env| async move {
            let c: Rc<dyn Node> = NbdClient::open(&env, o).await.unwrap();
            storm::storm(c, before, storm::seed(), 3000).await
        });
        drop(server);
        assert!(std::fs::read(dir.path("disk")).unwrap() == after);
    }
}

#[test]
fn a_client_that_may_wait_does_not_notice_that_its_export_was_deleted_and_came_back() {
    let dir = Dir::new();
    let (server, before) = serve(&dir);
    let mut o = NbdOptions::new(Address::Unix(dir.path("s")), "d");
    o.reconnect_delay = 20;
    let (stop, stopped) = std::sync::mpsc::channel();
    let blows = std::thread::spawn(move || {
        let mut n = 0;
        while stopped.recv_timeout(Duration::from_millis(60)).is_err() {
            n += 1;
            server.call(|s| async move {
                s.registry.delete("e", DeleteMode::Hard).unwrap();
                while !s.registry.query().is_empty() {
                    s.env.sleep(Duration::from_millis(1)).await;
                }
                let edge = s.edge().await;
                s.registry.add_nbd(options("e", "d"), edge, true).unwrap();
            });
        }
        drop(server);
        n
    });
    let after = with(|env| async move {
        let c: Rc<dyn Node> = NbdClient::open(&env, o).await.unwrap();
        let (begin, mut disk, mut round) = (env.now(), before, 0);
        while env.now() - begin < Duration::from_millis(700) {
            round += 1;
            disk = storm::storm(c.clone(), disk, storm::seed() + round, 200).await;
        }
        disk
    });
    stop.send(()).unwrap();
    assert!(blows.join().unwrap() > 3);
    assert!(std::fs::read(dir.path("disk")).unwrap() == after);
}
