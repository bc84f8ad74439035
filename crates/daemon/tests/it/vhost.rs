//! The vhost-user-blk export, seen by a front end and a guest's driver that keep to the specifications, or do not
//! (tests/vhost/front.py), and by a daemon that is killed and started again.

use crate::wire::compare;

#[test]
fn a_front_end_and_a_guest() {
    compare("../vhost/check.py", &[]);
}
