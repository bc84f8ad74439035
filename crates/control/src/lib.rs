#![forbid(unsafe_code)]
//! The QMP control protocol: sessions, dispatch, commands, events.
