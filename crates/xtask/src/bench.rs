//! placeholder
use crate::shell::{Outcome, fail};
pub(crate) fn run(_a: &[String]) -> Outcome {
    fail("not here yet")
}
