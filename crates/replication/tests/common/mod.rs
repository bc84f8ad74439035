//! What tests of the store have in common.

use replication::Epoch;
use replication::digest::Digest;
use replication::history::History;
use replication::store::Store;

/// Ends the open epoch, and waits until it may be decided.
pub(crate) async fn prepare(store: &Store, epoch: Epoch, history: History) -> block::Result<()> {
    store.seal(epoch, Digest::default(), history).await?;
    store.harden().await.prepared.pop().unwrap().1
}

/// Decides an epoch, and waits until it is shown.
pub(crate) async fn commit(store: &Store, epoch: Epoch) -> block::Result<()> {
    store.decide(epoch).await?;
    store.harden().await.decided.pop().unwrap().1.map(drop)
}
