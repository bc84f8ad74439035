//! What a command fails with.

use block::BlockError;
use jobs::JobError;
use qapi::{Value, json};

/// The error classes that clients match on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Everything that no client tells apart.
    Generic,
    /// No such command, or not now.
    CommandNotFound,
    /// No such block job.
    DeviceNotActive,
    /// No such device (some old commands).
    DeviceNotFound,
}

/// A failed command: class and sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct QmpError {
    /// What clients match on.
    pub class: Class,
    /// What people read.
    pub desc: String,
}

/// What a command ends with.
pub type Reply = Result<Value, QmpError>;

impl QmpError {
    /// An error without a class of its own.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError { class: Class::Generic, desc: desc.into() }
    }

    /// An error of a class that clients know.
    pub fn of(class: Class, desc: impl Into<String>) -> QmpError {
        QmpError { class, desc: desc.into() }
    }

    /// As on the wire.
    pub fn to_json(&self) -> Value {
        let class = match self.class {
            Class::Generic => "GenericError",
            Class::CommandNotFound => "CommandNotFound",
            Class::DeviceNotActive => "DeviceNotActive",
            Class::DeviceNotFound => "DeviceNotFound",
        };
        json!({"class": class, "desc": self.desc})
    }
}

impl From<BlockError> for QmpError {
    fn from(e: BlockError) -> QmpError {
        QmpError::generic(e.message())
    }
}

impl From<JobError> for QmpError {
    fn from(e: JobError) -> QmpError {
        let class = match e {
            JobError::NotActive(_) => Class::DeviceNotActive,
            JobError::NoDevice(_) => Class::DeviceNotFound,
            JobError::NotFound | JobError::Refused(_) => Class::Generic,
        };
        QmpError::of(class, e.to_string())
    }
}

impl std::fmt::Display for QmpError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.desc)
    }
}
