//! Random 4 KiB reads through the `nbd` driver, for measurements:
//! `nbd_client_load SOCKET EXPORT DEPTH CONNECTIONS [BYTES]`.

use block::Span;
use drivers::nbd_client::{NbdClient, NbdOptions};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use graph::Node;
use std::time::Duration;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, export, depth, connections, rest @ ..] = args.as_slice() else {
        eprintln!("usage: nbd_client_load SOCKET EXPORT DEPTH CONNECTIONS [BYTES]");
        std::process::exit(1);
    };
    let number = |s: &String| s.parse::<u64>().unwrap_or(1);
    let mut options = NbdOptions::new(env::Address::Unix(socket.into()), export);
    options.connections = number(connections) as u32;
    let (depth, bytes) = (number(depth), rest.first().map_or(4096, number));
    let executor = env::os::start(env::os::OsConfig::default());
    let env = executor.env();
    executor.run(async move {
        let client = match NbdClient::open(&env, options).await {
            Ok(c) => c,
            Err(e) => return eprintln!("{e}"),
        };
        env.sleep(Duration::from_millis(100)).await;
        let blocks = client.len() / bytes;
        let (begin, mut done, mut next) = (env.now(), 0u64, 1u64);
        let mut flying = FuturesUnordered::new();
        loop {
            let over = env.now() - begin > Duration::from_secs(1);
            while !over && (flying.len() as u64) < depth {
                next = next.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                flying.push(client.read(Span::new((next >> 20) % blocks * bytes, bytes)));
            }
            match flying.next().await {
                Some(Ok(_)) => done += 1,
                Some(Err(e)) => return eprintln!("{e}"),
                None => break,
            }
        }
        let took = (env.now() - begin).as_secs_f64();
        println!(
            "{:.0} requests/s, {:.0} MiB/s",
            done as f64 / took,
            (done * bytes) as f64 / took / f64::from(1 << 20)
        );
    });
}
