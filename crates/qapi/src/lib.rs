//! What comes over a control connection or the command line, and how it looks: JSON, `key=value`, the schema.
//!
//! Pure: no I/O, no state of the daemon. What must stay true: no input, however broken, panics or takes unbounded memory;
//! what passes [`Schema::check_json`] fits the schema, so commands read their arguments without further type checks.
#![forbid(unsafe_code)]

pub mod json;
pub mod keyval;
pub mod print;
mod schema;
mod validate;

pub use schema::Schema;
pub use serde_json::{Map, Number, Value, from_str, from_value, json};
