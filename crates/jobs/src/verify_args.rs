//! How the end of a copy is proven: `verify` and what belongs to it, common to all jobs that copy.

use block::{BlockError, Result};
use copy::{Coverage, ProofRules};
use env::Env;

/// Share of a disk that is compared by default where a sample is asked for, in percent.
const DEFAULT_SHARE: i64 = 5;

/// How much is compared.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum VerifyMode {
    /// Nothing.
    #[default]
    Off,
    /// A share, spread over the disk.
    Sampled,
    /// All.
    Full,
}

impl VerifyMode {
    /// The QMP name.
    pub const fn name(self) -> &'static str {
        match self {
            VerifyMode::Off => "off",
            VerifyMode::Sampled => "sampled",
            VerifyMode::Full => "full",
        }
    }
}

/// Arguments, as the client gave them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verify {
    /// How much.
    pub mode: VerifyMode,
    /// Percent of the disk, for a sample.
    pub share: Option<i64>,
    /// Chooses the sample.
    pub seed: Option<i64>,
    /// What differs is copied again.
    pub repair: bool,
}

impl Verify {
    /// All is compared, nothing repaired.
    pub const FULL: Verify = Verify { mode: VerifyMode::Full, share: None, seed: None, repair: false };

    /// Fails if the arguments do not fit together.
    pub(crate) fn check(&self) -> Result<()> {
        if self.mode != VerifyMode::Sampled && (self.share.is_some() || self.seed.is_some()) {
            return Err(BlockError::invalid(
                "'verify-share' and 'verify-seed' need 'verify' to be 'sampled'",
            ));
        }
        if self.mode == VerifyMode::Off && self.repair {
            return Err(BlockError::invalid("'verify-repair' needs 'verify' to be 'sampled' or 'full'"));
        }
        if !(1..=100).contains(&self.share.unwrap_or(DEFAULT_SHARE)) {
            return Err(BlockError::invalid("Parameter 'verify-share' expects a value in range [1, 100]"));
        }
        Ok(())
    }

    /// What that means; nothing if nothing is compared. The arguments have been checked.
    pub(crate) fn rules(&self, env: &Env) -> Option<ProofRules> {
        let coverage = match self.mode {
            VerifyMode::Off => return None,
            VerifyMode::Full => Coverage::Full,
            VerifyMode::Sampled => Coverage::Sampled {
                one_of: 100 / self.share.unwrap_or(DEFAULT_SHARE).clamp(1, 100).unsigned_abs(),
                // shown to users as a signed number
                seed: self.seed.map_or_else(|| env.random() >> 1, i64::cast_unsigned),
            },
        };
        Some(ProofRules { coverage, repair: self.repair })
    }
}
