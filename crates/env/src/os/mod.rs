//! The real world: io_uring where the kernel lets us, a thread pool where not.
