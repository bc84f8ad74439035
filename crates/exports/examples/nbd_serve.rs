//! Serves one image over NBD without the rest of the daemon, for measurements: `nbd_serve IMAGE SOCKET [EXPORT]`. A name
//! that ends in `.qcow2` is opened as such, anything else as raw.

use env::{Address, os};
use exports::{Export, ExportRegistry, NbdOptions, ServerOptions};
use graph::{Graph, Parent, Role};
use open::{NodeSpec, Opener};

fn main() {
    let mut args = std::env::args().skip(1);
    let (Some(image), Some(socket)) = (args.next(), args.next()) else {
        eprintln!("usage: nbd_serve IMAGE SOCKET [EXPORT]");
        std::process::exit(1);
    };
    let name = args.next().unwrap_or_else(|| "d".to_owned());
    let executor = os::start(os::OsConfig::default());
    let env = executor.env();
    let served = executor.run(async move {
        let graph = Graph::new(&env);
        let file = NodeSpec::file(&image);
        let spec = if image.ends_with(".qcow2") { file.qcow2() } else { file.raw() };
        let cell = Opener::new(&graph).open(&spec.named("disk")).await?;
        let parent = Parent::Backend(String::new());
        let edge = graph.attach(&cell, "root", Role::Root, parent, Export::demand(true)).await?;
        let registry = ExportRegistry::new(&env, |_| {});
        let mut options = ServerOptions::at(Address::Unix(socket.into()));
        options.max_connections = 0;
        registry.start_server(&options).await?;
        let export = NbdOptions { id: "e".to_owned(), name, writable: true, ..NbdOptions::default() };
        registry.add_nbd(export, edge, true)?;
        std::future::pending::<block::Result<()>>().await
    });
    if let Err(e) = served {
        eprintln!("nbd_serve: {e}");
        std::process::exit(1);
    }
}
