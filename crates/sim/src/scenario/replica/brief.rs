//! Short lives, so that there can be very many: two or three hosts on which things fail for a moment, and then one end or one change of sides
//! as in [`super::replica`] and [`super::turns`], which say what can happen and what is checked.

use super::turns::{DISK, Length};
use super::{Run, Wishes};
use crate::runner::Outcome;
use crate::{Refusal, World};
use block::SECTOR;
use std::rc::Rc;
use std::time::Duration;

/// What guests use: little is soon read.
const SECTORS: u64 = 64;
/// How long things fail.
const TROUBLE: Length = (Duration::from_millis(2), Duration::from_millis(120));
/// Between two things that happen meanwhile, at most.
const PACE: Duration = Duration::from_millis(40);

/// One seed.
pub fn brief(seed: u64, verbose: bool) -> Outcome {
    World::play(seed, verbose, |w| async move {
        let mut rng = w.rng("plan");
        let turns = rng.chance(0.6);
        let small = Wishes { disk: SECTORS * SECTOR, sectors: SECTORS, ..Wishes::NONE };
        let wishes = match turns {
            true => Wishes { disk: DISK, retain: *rng.choose(&[0, 2]), external: rng.chance(0.2), ..small },
            false => small,
        };
        let run = Rc::new(Run::new(w, rng, wishes, seed));
        if let Err(e) = run.live_briefly(turns).await
            && !run.world.verdict().is_bad()
        {
            run.bad(format!("the run broke off: {e}"));
        }
    })
}

impl Run {
    async fn live_briefly(self: &Rc<Self>, turns: bool) -> Result<(), Refusal> {
        for s in self.followers() {
            self.bring_up(s, false).await?;
        }
        self.bring_up(self.primary(), true).await?;
        self.start_guests();
        self.trouble(TROUBLE, PACE).await?;
        if self.world.verdict().is_bad() {
            return Ok(());
        }
        if !turns {
            return if self.draw(|r| r.chance(0.6)) { self.failover().await } else { self.peace().await };
        }
        self.turn().await?;
        if self.world.verdict().is_bad() {
            return Ok(());
        }
        self.end_alike().await
    }
}
