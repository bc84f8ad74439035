//! Moments in a node's work that a test may want to interrupt. A node tells the node below (or, for what the common part
//! of a node does, the node itself) before it takes the step; only `blkdebug` listens.
//!
//! What must stay true: telling costs one call that does nothing where nobody listens, and never waits. The names are part
//! of QMP (`BlkdebugEvent`), so clients know them.

macro_rules! events { ($($variant:ident = $name:literal, $text:literal;)*) => {
    /// A moment in a node's work.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
    pub enum DebugEvent { $(#[doc = $text] $variant,)* }
    impl DebugEvent {
        /// All of them, in QMP's order.
        pub const ALL: &'static [DebugEvent] = &[$(DebugEvent::$variant,)*];
        /// The name in QMP.
        pub const fn name(self) -> &'static str {
            match self { $(DebugEvent::$variant => $name,)* }
        }
    }
} }
events! {
    L1Update = "l1_update", "An entry of the L1 table is written.";
    L1GrowAllocTable = "l1_grow_alloc_table", "Space for a longer L1 table is allocated.";
    L1GrowWriteTable = "l1_grow_write_table", "The longer L1 table is written.";
    L1GrowActivateTable = "l1_grow_activate_table", "The header is pointed at the longer L1 table.";
    L2Load = "l2_load", "An L2 table is read.";
    L2Update = "l2_update", "An L2 table is written back.";
    L2UpdateCompressed = "l2_update_compressed", "An L2 entry of compressed data is written.";
    L2AllocCowRead = "l2_alloc_cow_read", "An L2 table is read to be copied.";
    L2AllocWrite = "l2_alloc_write", "A new L2 table is written.";
    ReadAio = "read_aio", "Data of a guest's read is read.";
    ReadBackingAio = "read_backing_aio", "Data of a guest's read is read from the layer below.";
    ReadCompressed = "read_compressed", "A compressed cluster is read.";
    WriteAio = "write_aio", "Data of a guest's write is written.";
    WriteCompressed = "write_compressed", "A compressed cluster is written.";
    VmstateLoad = "vmstate_load", "A machine's state is read.";
    VmstateSave = "vmstate_save", "A machine's state is written.";
    CowRead = "cow_read", "What is around a write in its cluster is read.";
    CowWrite = "cow_write", "What is around a write in its cluster is written.";
    ReftableLoad = "reftable_load", "The refcount table is read.";
    ReftableGrow = "reftable_grow", "The refcount table is made longer.";
    ReftableUpdate = "reftable_update", "The refcount table is written.";
    RefblockLoad = "refblock_load", "A refcount block is read.";
    RefblockUpdate = "refblock_update", "A refcount block is written.";
    RefblockUpdatePart = "refblock_update_part", "A refcount block is written back.";
    RefblockAlloc = "refblock_alloc", "A refcount block is allocated.";
    RefblockAllocHookup = "refblock_alloc_hookup", "A new refcount block is entered in the table.";
    RefblockAllocWrite = "refblock_alloc_write", "A new refcount block is written.";
    RefblockAllocWriteBlocks = "refblock_alloc_write_blocks", "New refcount blocks of a longer table are written.";
    RefblockAllocWriteTable = "refblock_alloc_write_table", "The longer refcount table is written.";
    RefblockAllocSwitchTable = "refblock_alloc_switch_table", "The header is pointed at the longer refcount table.";
    ClusterAlloc = "cluster_alloc", "Clusters are allocated.";
    ClusterAllocBytes = "cluster_alloc_bytes", "Part of a cluster is allocated for compressed data.";
    ClusterFree = "cluster_free", "Clusters are given back.";
    FlushToOs = "flush_to_os", "What a format has cached is written.";
    FlushToDisk = "flush_to_disk", "Everything written is made durable.";
    PwritevRmwHead = "pwritev_rmw_head", "What is before an unaligned write in its block is read.";
    PwritevRmwAfterHead = "pwritev_rmw_after_head", "That was read.";
    PwritevRmwTail = "pwritev_rmw_tail", "What is behind an unaligned write in its block is read.";
    PwritevRmwAfterTail = "pwritev_rmw_after_tail", "That was read.";
    Pwritev = "pwritev", "A write is carried out.";
    PwritevZero = "pwritev_zero", "A write of zeroes is carried out.";
    PwritevDone = "pwritev_done", "A write has ended.";
    EmptyImagePrepare = "empty_image_prepare", "An image is about to be emptied.";
    L1ShrinkWriteTable = "l1_shrink_write_table", "The end of the L1 table is cleared.";
    L1ShrinkFreeL2Clusters = "l1_shrink_free_l2_clusters", "L2 tables of the L1 table's end are given back.";
    CorWrite = "cor_write", "What was read is written to the upper layer.";
    ClusterAllocSpace = "cluster_alloc_space", "Space for new clusters is set aside in the file.";
    None = "none", "No moment: what is set for it holds from the start.";
}

impl DebugEvent {
    /// The event with this name in QMP.
    pub fn named(name: &str) -> Option<DebugEvent> {
        Self::ALL.iter().copied().find(|e| e.name() == name)
    }
}
