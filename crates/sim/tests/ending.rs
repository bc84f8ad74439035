//! The end of a daemon that still carries out a command: nothing may be opened, or stay open, behind it.
#![allow(clippy::unwrap_used)] // a test says by panicking

use serde_json::json;
use sim::{Booted, Fault, History, Image, Op, Refusal, Rule, World};
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

/// Ends the daemon while the file that `blockdev-add` opens does not answer for the given time; gives that command's answer
/// and what was wrong.
fn ended_while_adding(hangs: Duration) -> (Option<Result<(), String>>, Option<String>) {
    let answer = Rc::new(RefCell::new(None));
    let out = answer.clone();
    let outcome = World::play(1, false, |w| async move {
        let (outside, _process) = w.start();
        w.host().install("/x.img", Image::from_bytes(&vec![0; 1 << 20]));
        let Some(daemon) = Booted::start(&w).await else { return };
        let m = daemon.manage(&w, &outside, &Rc::new(History::new())).await.ok().unwrap();
        w.host().fault(Rule::once("/x.img", Op::Open, Fault::Hang));
        let adding = outside.spawn("adding", async move {
            let node = json!({"driver": "file", "node-name": "x", "filename": "/x.img"});
            *out.borrow_mut() = match m.execute("blockdev-add", node).await {
                Ok(_) => Some(Ok(())),
                Err(Refusal::Error(e)) => Some(Err(e)),
                Err(Refusal::Gone) => None,
            };
        });
        while w.host().hung() == 0 {
            outside.sleep(Duration::from_micros(100)).await;
        }
        let (env, host) = (outside.clone(), w.host().clone());
        let release = outside.spawn("release", async move {
            env.sleep(hangs).await;
            host.release_hung();
        });
        daemon.quit(&w, &outside).await;
        release.join().await;
        adding.join().await;
        Booted::all_have_quit(&w);
    });
    (answer.take(), outcome.violation)
}

#[test]
fn a_node_that_is_being_opened_when_the_daemon_ends_is_closed_again() {
    assert_eq!(ended_while_adding(Duration::from_millis(100)), (Some(Ok(())), None));
}

#[test]
fn a_file_that_never_answers_does_not_keep_the_daemon() {
    // nobody waits for that long: the limit of `quit` is shorter
    let (_, wrong) = ended_while_adding(Duration::from_secs(600));
    assert_eq!(wrong.as_deref(), None);
}
