//! Serves one raw file over NBD, for measurements: `nbd_serve IMAGE SOCKET [EXPORT]`.

#[path = "../tests/support/mod.rs"]
mod support;

use support::{Server, options};

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(image), Some(socket)) = (args.next(), args.next()) else {
        eprintln!("usage: nbd_serve IMAGE SOCKET [EXPORT]");
        std::process::exit(1);
    };
    let mut o = exports::ServerOptions::at(env::Address::Unix(socket.into()));
    o.max_connections = 0;
    let _server = Server::start(image.as_ref(), o, options("e", &args.next().unwrap_or_else(|| "d".into())));
    loop {
        std::thread::park();
    }
}
