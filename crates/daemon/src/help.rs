//! What `--help` and its relatives print.

/// The version text. The first line has QSD's form, which management programs parse.
pub(crate) fn version() -> String {
    format!(
        "liveblkd version 10.0.2 (liveblk {})\nStorage daemon with the interface of qemu-storage-daemon 10.0.2",
        env!("CARGO_PKG_VERSION")
    )
}

/// `--help`.
pub(crate) const USAGE: &str = "\
Usage: liveblkd [options]
Serves disk images, and works on them while they are in use. Options take effect in the order given.

  -h, --help             show this text and exit
  -V, --version          show the version and exit
  -T, --trace <pattern>  accepted for compatibility; there are no trace events yet

  --blockdev [driver=]<driver>[,node-name=<name>][,read-only=on|off][,auto-read-only=on|off]
             [,discard=ignore|unmap][,detect-zeroes=on|off|unmap][,force-share=on|off]
             [,cache.direct=on|off][,cache.no-flush=on|off][,<option of the driver>=<value>...]
  --blockdev <JSON object>
                         open a node. Drivers: blkcolo, blkdebug, blklogwrites, blkverify, compress,
                         copy-before-write, copy-on-read, file, host_device, nbd, null-aio, null-co, preallocate,
                         qcow2, quorum, raw, replication, snapshot-access, throttle

  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>][,handshake-max-seconds=<n>]
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,...]
                         start the NBD server

  --export [type=]nbd,id=<id>,node-name=<node>[,name=<export name>][,writable=on|off]
           [,description=<text>][,writethrough=on|off]
                         offer a node over NBD (after --nbd-server)
  --export [type=]vhost-user-blk,id=<id>,node-name=<node>,addr.type=unix,addr.path=<path>
           [,writable=on|off][,writethrough=on|off][,num-queues=<n>][,logical-block-size=<bytes>]
                         offer a node to a virtual machine
  --export [type=]fuse,id=<id>,node-name=<node>,mountpoint=<file>
           [,writable=on|off][,writethrough=on|off][,growable=on|off][,allow-other=on|off|auto]
                         offer a node as a file, in the place of an existing one

  --chardev socket,id=<id>,path=<path>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,fd=<number>[,server=on|off]
  --chardev stdio,id=<id>
                         where a monitor finds its clients

  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         speak QMP on a chardev

  --object <type>,id=<id>[,<property>=<value>...]
  --object help          list the types of objects
                         create an object

  --state-dir <path>     keep nodes, exports, servers, objects and jobs in this directory, and come back with them after
                         any end of the process; options that took effect in an earlier life are not applied again

  --daemonize            go into the background once all options have taken effect
  --pidfile <path>       write the process number to a file once all options have taken effect
";

/// `--object help`.
pub(crate) fn objects() -> String {
    let names = control::object_types().map(|(name, _)| format!("  {name}\n"));
    format!("List of user creatable objects:\n{}", names.collect::<String>())
}

/// `--object TYPE,help`; `None` for a type that there is not.
pub(crate) fn object(kind: &str) -> Option<String> {
    let (_, mut properties) = control::object_types().find(|(name, _)| *name == kind)?;
    properties.sort_unstable();
    let lines = properties.iter().map(|(name, of)| format!("  {name}=<{of}>\n"));
    Some(format!("{kind} options:\n{}", lines.collect::<String>()))
}

/// `--chardev help`.
pub(crate) const CHARDEVS: &str =
    "Available chardev backend types: \n  memory\n  null\n  ringbuf\n  socket\n  stdio\n";
