//! Drivers that only tests and experiments use: they make storage fail, check it, or record what is done to it.

pub mod blkdebug;
mod blkdebug_config;
pub mod blkdebug_rules;
pub mod blklogwrites;
pub mod blkverify;
