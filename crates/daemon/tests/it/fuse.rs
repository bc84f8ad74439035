//! The FUSE export, seen by programs that read and write files (tests/fuse/check.py).

use crate::wire::compare;

#[test]
fn a_disk_as_a_file() {
    compare("../fuse/check.py", &[]);
}
