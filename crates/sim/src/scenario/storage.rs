//! Guests straight on a simulated file, with faults, kills and power losses: the harness itself on trial.
//!
//! No production code but `env`'s contract is in here. What must stay true: an honest disk never raises an alarm; each of
//! the dishonest ones ([`Lie`]) does, within a few seeds. A harness that misses them would miss the same in the daemon.

use crate::guest::{Disk, Guest, Habits, read_all};
use crate::history::{Crash, History};
use crate::runner::Outcome;
use crate::{Image, Profile, Verdict, World};
use block::{Data, Io, SECTOR, Span};
use env::{File, OpenMode, Punch};
use std::cell::RefCell;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

const PATH: &str = "/disk";

/// A way for a disk to be wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lie {
    /// A flush is answered at once.
    FlushDoesNothing,
    /// A flush is answered before the writes that were answered before it are on disk.
    FlushBeforeOlderWrites,
    /// One write in a hundred goes nowhere.
    LosesWrites,
    /// Reads are answered from what was read there the last time, now and then.
    StaleReads,
    /// One write in a hundred goes one sector too far.
    WritesBeside,
    /// Writes are answered before they are done.
    AnswersEarly,
    /// A write of several sectors that overlaps with another is merged wrongly within a sector.
    MixesWithinSector,
}

/// All of them.
pub const LIES: [Lie; 7] = [
    Lie::FlushDoesNothing,
    Lie::FlushBeforeOlderWrites,
    Lie::LosesWrites,
    Lie::StaleReads,
    Lie::WritesBeside,
    Lie::AnswersEarly,
    Lie::MixesWithinSector,
];

/// A raw file as a guest's disk, honest or not.
struct FileDisk {
    file: Rc<dyn File>,
    env: env::Env,
    sectors: u64,
    lie: Option<Lie>,
    last_read: RefCell<Option<(Span, Data)>>,
}

impl FileDisk {
    fn lies(&self, lie: Lie, one_in: u64) -> bool {
        self.lie == Some(lie) && self.env.random().is_multiple_of(one_in)
    }
}

impl Disk for FileDisk {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn read(&self, at: Span) -> Io<'_, Data> {
        Box::pin(async move {
            if self.lies(Lie::StaleReads, 4)
                && let Some((span, data)) = &*self.last_read.borrow()
                && span.contains(&at)
            {
                return Ok(data.slice((at.start - span.start) as usize, at.len as usize));
            }
            let data = self.file.read(at).await?;
            *self.last_read.borrow_mut() = Some((at, data.clone()));
            Ok(data)
        })
    }

    fn write(&self, offset: u64, data: Data, fua: bool) -> Io<'_> {
        Box::pin(async move {
            let offset = if self.lies(Lie::WritesBeside, 100) { offset + SECTOR } else { offset };
            if self.lies(Lie::LosesWrites, 100) {
                return Ok(());
            }
            if self.lies(Lie::MixesWithinSector, 50) {
                let half = (data.len() / 2 - data.len() / 2 % 16).max(16);
                self.file.write(offset, data.slice(0, half)).await?;
                return Ok(());
            }
            if self.lie == Some(Lie::AnswersEarly) {
                let file = self.file.clone();
                self.env.spawn("late write", async move {
                    let _ = file.write(offset, data).await;
                });
                return Ok(());
            }
            self.file.write(offset, data).await?;
            if fua { self.flush().await } else { Ok(()) }
        })
    }

    fn zero(&self, at: Span, may_unmap: bool) -> Io<'_> {
        Box::pin(async move {
            let how = if may_unmap { Punch::Release } else { Punch::Keep };
            match self.file.zero(at, how).await {
                Err(e) if e.kind() == block::ErrorKind::Unsupported => {
                    self.file.write(at.start, Data::zeroes(at.len as usize)).await
                }
                other => other,
            }
        })
    }

    fn discard(&self, at: Span) -> Io<'_> {
        Box::pin(async move {
            match self.file.discard(at).await {
                Err(e) if e.kind() == block::ErrorKind::Unsupported => Ok(()),
                other => other,
            }
        })
    }

    fn flush(&self) -> Io<'_> {
        Box::pin(async move {
            match self.lie {
                Some(Lie::FlushDoesNothing) => Ok(()),
                Some(Lie::FlushBeforeOlderWrites) => {
                    let file = self.file.clone();
                    self.env.spawn("late barrier", async move {
                        let _ = file.barrier().await;
                    });
                    Ok(())
                }
                _ => self.file.barrier().await,
            }
        })
    }
}

/// An honest disk.
pub fn honest(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, |w| play(w, None))
}

/// A dishonest one.
pub fn lying(lie: Lie, seed: u64) -> Outcome {
    World::play(seed, false, move |w| play(w, Some(lie)))
}

async fn play(world: World, lie: Option<Lie>) {
    let mut rng = world.rng("scenario");
    let sectors = *rng.choose(&[16, 200, 2048]);
    world.host().install(PATH, Image::from_bytes(&vec![0; (sectors * SECTOR) as usize]));
    world.host().set_profile(Profile::drawn(&mut rng));
    let history = Rc::new(History::told_by(world.machine()));
    for life in 0..rng.between(1, 3) {
        let (env, process) = world.start();
        let disk = open(&env, sectors, lie).await;
        let faulty = world.host().faults() > 0;
        let guests: Vec<Guest> = (0..rng.between(1, 3) as u32)
            .map(|n| {
                let habits = Habits { errors_allowed: true, ..Habits::drawn(&mut rng, n, sectors) };
                let d = disk.clone();
                let dial = Box::new(move || {
                    let d: Rc<dyn Disk> = d.clone();
                    Box::pin(async move { Ok(d) }) as _
                });
                Guest::start(&env, habits, history.clone(), world.verdict().clone(), world.rng("guest"), dial)
            })
            .collect();
        let (watch, _watcher) = world.start();
        let crash_after = rng.duration(Duration::from_millis(1), Duration::from_secs(2));
        let all_done = async {
            for g in &guests {
                g.join().await;
            }
        };
        let done = watch.timeout(crash_after, all_done).await.is_some();
        world.count(if done { "lives to the end" } else { "lives cut short" }, 1);
        let power = rng.chance(0.7);
        drop(disk);
        if power {
            world.host().power_loss(&[&process]);
        } else {
            process.kill();
        }
        drop(guests);
        world.host().clear_faults();
        world.verdict().check("after the crash", survive(&world, &history, sectors, power).await);
        world.count("operations", history.len() as u64);
        world.count("faults", u64::from(faulty));
        if world.verdict().is_bad() {
            world.machine().say(|| format!("life {life}"));
            return;
        }
    }
}

async fn open(env: &env::Env, sectors: u64, lie: Option<Lie>) -> Rc<FileDisk> {
    let mode = OpenMode { write: true, ..OpenMode::default() };
    let file = loop {
        // opening may meet a fault
        match env.open(Path::new(PATH), mode).await {
            Ok(f) => break f,
            Err(_) => env.sleep(Duration::from_millis(10)).await,
        }
    };
    Rc::new(FileDisk { file, env: env.clone(), sectors, lie, last_read: RefCell::new(None) })
}

/// Looks at what is left, without faults, and holds it against the history.
async fn survive(world: &World, history: &History, sectors: u64, power: bool) -> Result<(), String> {
    let image = world.host().image(PATH).ok_or("the file is gone")?;
    let found = crate::values_of(&image.read(Span::new(0, sectors * SECTOR)), 0);
    history.crash(&found, if power { Crash::PowerLoss } else { Crash::KillWriteThrough })
}

/// For scenarios whose disk is honest at the end: reads everything and checks the history.
pub async fn check_all(disk: &dyn Disk, history: &History, verdict: &Verdict) {
    match read_all(disk, history, u32::MAX).await {
        Ok(_) => verdict.check("history", history.check()),
        Err(e) => verdict.violation(format!("the last read of everything: {e:?}")),
    }
}
