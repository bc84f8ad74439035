//! Protocol, format and filter drivers other than qcow2.
//!
//! A driver gets plain option structs and edges to its children; it knows nothing of JSON, jobs or exports. The edge above
//! it has checked bounds, alignment and permission, so a driver only carries requests out.
#![forbid(unsafe_code)]

pub mod file;
pub mod filters;
mod locks;
pub mod names;
pub mod nbd_client;
pub mod null;
pub mod raw;
pub mod testing;
