//! Bugs planted on purpose, to test the tests: each re-creates a real defect of this kind of program. Without the
//! feature `planted-bugs` none of this exists in the code.

/// A defect that can be switched on for the current thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// Copies and guest writes of the same bytes do not wait for one another.
    NoRangeLock,
    /// The dirty bit is cleared after the source was read instead of before.
    ClearAfterRead,
    /// A guest write marks its range dirty before it is done, and not after.
    MarkBeforeWrite,
    /// In sync is reported while copies are in flight.
    ReadyInFlight,
    /// A soft cancel ends like a completion.
    CancelCompletes,
    /// A slot of the window is counted only once the copy runs.
    SlotCountedLate,
    /// Zeroes at the end of the disk are not copied.
    ZeroTailSkipped,
    /// A failed copy does not become dirty again.
    FailureForgotten,
    /// A failed synchronous write does not become dirty again.
    ActiveFailureForgotten,
    /// The source is not frozen while the rest is copied for completion.
    NoDrain,
    /// The target is taken as synchronous while older unsynchronous writes are still in flight.
    SyncedTooEarly,
    /// A partly written granule is taken as clean.
    PartialGranuleClean,
    /// A comparison does not wait for copies and synchronous writes of the same bytes.
    UnlockedCheck,
    /// A comparison does not look at clients' writes under way that take no lock.
    LooseUnseen,
    /// What a client wrote to both sides counts as compared.
    ChangeNotCompared,
    /// The client is not held until the rest has been compared.
    UnprovenEnd,
    /// What the target had taken and not flushed when its link was lost is not copied again.
    DoubtForgotten,
    /// A second change of a granule of which only parts are to be copied is forgotten.
    PartForgotten,
    /// So is a synchronous write into a part of one that is not sent to the target.
    PartLeftOut,
}

impl Bug {
    /// All of them.
    pub const ALL: [Bug; 19] = [
        Bug::NoRangeLock,
        Bug::ClearAfterRead,
        Bug::MarkBeforeWrite,
        Bug::ReadyInFlight,
        Bug::CancelCompletes,
        Bug::SlotCountedLate,
        Bug::ZeroTailSkipped,
        Bug::FailureForgotten,
        Bug::ActiveFailureForgotten,
        Bug::NoDrain,
        Bug::SyncedTooEarly,
        Bug::PartialGranuleClean,
        Bug::UnlockedCheck,
        Bug::LooseUnseen,
        Bug::ChangeNotCompared,
        Bug::UnprovenEnd,
        Bug::DoubtForgotten,
        Bug::PartForgotten,
        Bug::PartLeftOut,
    ];
}

env::planted_bugs!(Bug);
