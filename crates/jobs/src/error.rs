//! Errors of commands about jobs.

use block::BlockError;
use std::fmt;

/// Why a command about a job was refused. `control` turns the variants into QMP error classes.
#[derive(Clone, Debug)]
pub enum JobError {
    /// No such job (`job-*` commands; class GenericError).
    NotFound,
    /// No such block job (`block-job-*` commands; class DeviceNotActive).
    NotActive(String),
    /// No such disk (`block-commit`; class DeviceNotFound).
    NoDevice(String),
    /// Refused (class GenericError).
    Refused(BlockError),
}

impl JobError {
    pub(crate) fn refused(message: impl Into<String>) -> JobError {
        JobError::Refused(BlockError::invalid(message))
    }
}

impl fmt::Display for JobError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            JobError::NotFound => f.write_str("Job not found"),
            JobError::NotActive(id) => write!(f, "Block job '{id}' not found"),
            JobError::NoDevice(name) => write!(f, "Device '{name}' not found"),
            JobError::Refused(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for JobError {}

impl From<BlockError> for JobError {
    fn from(e: BlockError) -> JobError {
        JobError::Refused(e)
    }
}
