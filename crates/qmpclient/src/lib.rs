//! A small blocking QMP client: one command at a time, events kept in the order they came.
//!
//! What can happen: nobody listens, another client holds the monitor, the daemon dies in the middle. What must stay true:
//! no call waits for ever, a partial line survives a time-out, and every error says what to do next.
#![forbid(unsafe_code)]

use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a daemon may take to answer a command before the human is told.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// What a call ends with: a value, or a sentence for a human.
pub type Outcome<T = ()> = Result<T, String>;

/// A negotiated connection.
pub struct Client {
    reader: BufReader<UnixStream>,
    line: String,
    events: VecDeque<Value>,
    next_id: u64,
}

/// How long a server may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Waits until `child`, just started, listens at `socket`. That the name is there says too little: it appears when
/// the socket is bound, and a connection is refused until it listens, which a busy machine can put far apart. Nor is a
/// connection made to find out: qemu-storage-daemon may reset the one that follows it.
///
/// # Errors
/// The child ended, or does not listen after 20 s.
pub fn until_listening(child: &mut std::process::Child, socket: &Path) -> Outcome {
    let begin = Instant::now();
    while !listens(socket)? {
        if let Ok(Some(status)) = child.try_wait() {
            return Err(format!("ended at once ({status})"));
        }
        if begin.elapsed() > START_LIMIT {
            return Err(format!("does not listen at {} after {} s", socket.display(), START_LIMIT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a process listens at `socket`, by the system's table of Unix sockets (proc_net(5)).
fn listens(socket: &Path) -> Outcome<bool> {
    /// The flag `__SO_ACCEPTCON`, as the table writes it.
    const LISTENING: &[u8] = b"00010000";
    let table = std::fs::read("/proc/net/unix").map_err(|e| format!("cannot read /proc/net/unix: {e}"))?;
    let name = socket.as_os_str().as_encoded_bytes();
    Ok(table.split(|b| *b == b'\n').any(|line| {
        // number, references, protocol, flags, type, state, inode, and the name to the end of the line
        line.split(|b| *b == b' ').filter(|f| !f.is_empty()).nth(3) == Some(LISTENING) && line.ends_with(name)
    }))
}

impl Client {
    /// Connects and negotiates.
    pub fn connect(path: &Path) -> Outcome<Client> {
        let stream = UnixStream::connect(path).map_err(|e| {
            format!(
                "no daemon answers at {}: {e}\n  Start one with: liveblkd --chardev socket,id=c,path={},server=on,wait=off \
                 --monitor chardev=c …",
                path.display(),
                path.display()
            )
        })?;
        let mut client = Client {
            reader: BufReader::new(stream),
            line: String::new(),
            events: VecDeque::new(),
            next_id: 0,
        };
        let begin = Instant::now();
        let greeting = loop {
            if let Some(v) = client.read(Duration::from_millis(200))? {
                break v;
            }
            if begin.elapsed() > Duration::from_secs(5) {
                return Err(format!(
                    "{} does not greet: another client is connected (a monitor serves one at a time), or it is no QMP socket",
                    path.display()
                ));
            }
        };
        if greeting.get("QMP").is_none() {
            return Err(format!("{} does not speak QMP (it said {greeting})", path.display()));
        }
        client.execute("qmp_capabilities", &json!({}))?;
        Ok(client)
    }

    /// Runs a command and gives its return value. An error names the command and what the daemon said.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Outcome<Value> {
        self.next_id += 1;
        let id = self.next_id;
        let request = json!({"execute": command, "arguments": arguments, "id": id});
        self.reader
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .map_err(|e| format!("{command}: the daemon went away: {e}"))?;
        let begin = Instant::now();
        while begin.elapsed() < ANSWER_LIMIT {
            let Some(message) = self.read(ANSWER_LIMIT)? else { continue };
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if message.get("id") == Some(&json!(id)) {
                return match message.get("error") {
                    None => Ok(message["return"].clone()),
                    Some(e) => Err(format!("{command}: {}", e["desc"].as_str().unwrap_or("failed"))),
                };
            }
        }
        Err(format!(
            "{command}: no answer within {} s; the daemon may be stuck on slow storage",
            ANSWER_LIMIT.as_secs()
        ))
    }

    /// The next event, waiting up to `limit`.
    pub fn event(&mut self, limit: Duration) -> Outcome<Option<Value>> {
        if let Some(e) = self.events.pop_front() {
            return Ok(Some(e));
        }
        Ok(self.read(limit)?.filter(|m| m.get("event").is_some()))
    }

    /// One message, or `None` after `limit`. A partial line stays for the next call.
    fn read(&mut self, limit: Duration) -> Outcome<Option<Value>> {
        self.reader.get_ref().set_read_timeout(Some(limit)).map_err(|e| e.to_string())?;
        match self.reader.read_line(&mut self.line) {
            Ok(0) => Err("the daemon closed the connection".to_owned()),
            Ok(_) => {
                let text = std::mem::take(&mut self.line);
                if text.trim().is_empty() {
                    return Ok(None);
                }
                serde_json::from_str(&text)
                    .map(Some)
                    .map_err(|e| format!("the daemon sent no JSON ({e}): {text}"))
            }
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(e) => Err(format!("the daemon went away: {e}")),
        }
    }
}
