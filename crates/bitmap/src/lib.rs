//! Dirty bitmaps: which granules of a disk have changed. Pure; nothing here waits or does I/O.
//!
//! What can happen: a guest marks single granules at any offset of a 64 TiB disk, a job walks from dirty run to dirty
//! run while they are marked, whole disks are marked or cleared at once, bitmaps of different granularity are merged,
//! a disk grows or shrinks. What must stay true:
//! * The count is exact, and bits past the end of the disk are never set.
//! * Setting rounds outwards and clearing rounds inwards: a bitmap may claim too much, never too little.
//! * Every operation costs what is *dirty* (or touched), not what the disk's length would suggest; an all-clean or
//!   all-dirty disk takes almost no memory.
#![forbid(unsafe_code)]

mod dirty;
mod map;
mod tree;

pub use dirty::{BitmapList, DirtyBitmap};
pub use map::{Areas, Bitmap, MAX_GRANULARITY, MAX_GRANULES, MIN_GRANULARITY};
