//! Rules that can be removed one at a time, to test the tests: each makes a known failure of replication possible again. Without the
//! feature `planted-bugs` none of this exists in the code.

/// A rule that can be switched off for the current thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// Frames of an older generation are taken.
    NoGenerationCheck,
    /// A gap in the sequence is not noticed.
    NoSequenceCheck,
    /// The digest of an epoch is not compared.
    NoDigestCheck,
    /// Dirty bits of an epoch are dropped when its mark is sent, not when its commit is acknowledged.
    DirtyClearedOnSend,
    /// What was written before a crash of the primary is not remembered as dirty.
    NoActivityLog,
    /// A refused change does not veto the checkpoint.
    RefusalForgotten,
    /// A peer that is being synchronized counts as a copy.
    SyncingCounts,
    /// A checkpoint is made while it is not known whether a disk has another length.
    MarkedWhileResizing,
    /// A secondary without a checkpoint refuses a primary that has grown since it let it in.
    LengthRefused,
    /// Undo: the old content is not durable before it is overwritten.
    PreimageNotDurable,
    /// A guest's flush on the secondary does not flush its own writes.
    OwnNotFlushed,
    /// Undo: the disk is not flushed before the decision is recorded.
    DataNotFlushedBeforeCommit,
    /// The record of the decision is not durable before it is acknowledged.
    CommitNotDurable,
    /// Redo: the disk is not flushed before the log is trimmed.
    DataNotFlushedBeforeTrim,
    /// The intent to fail over is not durable before the merge.
    IntentNotDurable,
    /// The merge is not flushed before it counts as done.
    MergeNotFlushed,
    /// What is buffered is thrown away on restart (as QEMU does).
    EmptiedOnRestart,
    /// What a secondary says its disks may hold besides its checkpoint is not sent to it again.
    DoubtForgotten,
    /// A secondary takes a group over that it does not hold completely.
    HandOverUnchecked,
    /// A primary that has handed over serves again before it knows that the other side did not take over.
    HandOverResumes,
    /// A reader does not look again after it has read the disk.
    NoRecheck,
    /// Redo: which checkpoints the disks leave behind is not durable before they do.
    OldestNotDurable,
    /// Undo: what a committed epoch overwrote is forgotten although the checkpoint before it is kept.
    RetainedForgotten,
    /// Where a committed epoch changed the image is forgotten when the disks have it.
    PastForgotten,
    /// Checkpoints of a path that was left are offered as those of the present one.
    OtherPathOffered,
    /// That the disks hold all of an epoch is recorded before they are flushed.
    StoredTooEarly,
    /// What the disks did not hold of an ended epoch when the process ended counts as stored with the next flush.
    LostCountsAsStored,
    /// What is recorded while the log is being flushed counts as flushed.
    LateCountsAsFlushed,
    /// An own write of the view before a decision is there after a crash.
    OwnOutlivesDecision,
}

impl Bug {
    /// Those of the state machines.
    pub const CORE: [Bug; 12] = [
        Bug::NoGenerationCheck,
        Bug::NoSequenceCheck,
        Bug::NoDigestCheck,
        Bug::DirtyClearedOnSend,
        Bug::NoActivityLog,
        Bug::RefusalForgotten,
        Bug::SyncingCounts,
        Bug::MarkedWhileResizing,
        Bug::LengthRefused,
        Bug::DoubtForgotten,
        Bug::HandOverUnchecked,
        Bug::HandOverResumes,
    ];
    /// Those of the store.
    pub const STORE: [Bug; 16] = [
        Bug::PreimageNotDurable,
        Bug::OwnNotFlushed,
        Bug::DataNotFlushedBeforeCommit,
        Bug::CommitNotDurable,
        Bug::DataNotFlushedBeforeTrim,
        Bug::IntentNotDurable,
        Bug::MergeNotFlushed,
        Bug::EmptiedOnRestart,
        Bug::NoRecheck,
        Bug::OldestNotDurable,
        Bug::RetainedForgotten,
        Bug::PastForgotten,
        Bug::StoredTooEarly,
        Bug::LostCountsAsStored,
        Bug::LateCountsAsFlushed,
        Bug::OwnOutlivesDecision,
    ];
}

env::planted_bugs!(Bug);
