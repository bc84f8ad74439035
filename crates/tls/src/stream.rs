//! A stream under TLS.
//!
//! The library keeps state and buffers; bytes are moved here. What can happen: the peer ends without a good-bye (the
//! end of the stream; the protocol above knows whether it was in the middle of something), sends what cannot be decrypted
//! (an error, and an alert to the peer), or asks for something to be sent while somebody else is sending (that somebody
//! sends it). What must stay true: one send at a time on the stream below, in the order of encryption; what is
//! decrypted and not yet asked for is bounded by one receive.

use crate::verify::{certificate_problem, distinguished_name};
use block::{BlockError, Data, ErrorKind, Io, Result};
use bytes::{Bytes, BytesMut};
use env::sync::Semaphore;
use env::{Credentials, Stream};
use rustls::Connection;
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::rc::Rc;

/// Bytes encrypted before they are sent: some records in one send, little in memory.
const BATCH: usize = 256 << 10;
/// Fewest bytes to receive at once: a whole record (RFC 8446, 5.2).
const RECORD: usize = (16 << 10) + 256 + 5;

/// A connected stream whose bytes are encrypted and authenticated.
pub struct TlsStream {
    below: Rc<dyn Stream>,
    conn: RefCell<Connection>,
    plain: RefCell<BytesMut>,
    /// Held while encrypted bytes are on their way to the stream below.
    sending: Semaphore,
    /// A send was given up half-way: what follows would not decrypt.
    torn: Cell<bool>,
}

/// Marks the stream as torn unless the send it accompanies ends.
struct Sending<'a> {
    torn: &'a Cell<bool>,
}

impl<'a> Sending<'a> {
    fn begin(torn: &'a Cell<bool>) -> Sending<'a> {
        torn.set(true);
        Sending { torn }
    }
    fn done(self) {
        self.torn.set(false);
    }
}

fn failed(e: &rustls::Error) -> BlockError {
    let why = match e {
        rustls::Error::InvalidCertificate(_) => certificate_problem(Err(e.clone())).err().unwrap_or_default(),
        e => e.to_string(),
    };
    BlockError::new(ErrorKind::Permission, format!("TLS handshake failed: {why}"))
}

fn ended(what: &str) -> BlockError {
    BlockError::new(ErrorKind::Disconnected, format!("{what}: the peer closed the connection"))
}

impl TlsStream {
    /// Shakes hands over `below`.
    pub(crate) async fn shake(below: Rc<dyn Stream>, mut conn: Connection) -> Result<Rc<TlsStream>> {
        conn.set_buffer_limit(None);
        let stream = TlsStream {
            below,
            conn: RefCell::new(conn),
            plain: RefCell::default(),
            sending: Semaphore::new(1),
            torn: Cell::new(false),
        };
        loop {
            stream.flush().await?;
            if !stream.conn.borrow().is_handshaking() {
                return Ok(Rc::new(stream));
            }
            let piece = stream.below.recv(RECORD).await?;
            if piece.is_empty() {
                return Err(ended("TLS handshake failed"));
            }
            if let Err(e) = stream.decrypt(&piece) {
                // The peer is told why, if it still listens.
                let _ = stream.flush().await;
                return Err(failed(&e));
            }
        }
    }

    /// Who the peer says it is in a certificate that was verified: its distinguished name (RFC 4514). `None` if it
    /// showed none.
    pub fn peer_name(&self) -> Option<String> {
        distinguished_name(self.conn.borrow().peer_certificates()?.first()?)
    }

    /// Takes what arrived; what it decrypts to is added to `plain`.
    fn decrypt(&self, mut piece: &[u8]) -> std::result::Result<(), rustls::Error> {
        let (mut conn, mut plain) = (self.conn.borrow_mut(), self.plain.borrow_mut());
        while !piece.is_empty() {
            match conn.read_tls(&mut piece) {
                Ok(0) => break, // after the peer's good-bye nothing counts
                Ok(_) => {}
                Err(e) => return Err(rustls::Error::General(e.to_string())),
            }
            let ready = conn.process_new_packets()?.plaintext_bytes_to_read();
            let from = plain.len();
            plain.resize(from + ready, 0);
            conn.reader()
                .read_exact(&mut plain[from..])
                .map_err(|e| rustls::Error::General(e.to_string()))?;
        }
        Ok(())
    }

    /// Sends what the library wants sent.
    async fn flush(&self) -> Result<()> {
        if !self.conn.borrow().wants_write() {
            return Ok(());
        }
        let _turn = self.sending.acquire(1).await;
        self.send_pending().await
    }

    /// The encrypted bytes that are not yet sent.
    fn pending(&self) -> std::io::Result<Vec<u8>> {
        let (mut conn, mut bytes) = (self.conn.borrow_mut(), Vec::new());
        while conn.wants_write() {
            conn.write_tls(&mut bytes)?;
        }
        Ok(bytes)
    }

    async fn send_pending(&self) -> Result<()> {
        while self.conn.borrow().wants_write() {
            if self.torn.get() {
                return Err(BlockError::new(ErrorKind::Disconnected, "TLS: an earlier send was given up"));
            }
            let bytes = self.pending().map_err(|e| BlockError::new(ErrorKind::Io, format!("TLS: {e}")))?;
            let sending = Sending::begin(&self.torn);
            self.below.send(bytes.into()).await?;
            sending.done();
        }
        Ok(())
    }

    async fn encrypt_and_send(&self, data: Data) -> Result<()> {
        let _turn = self.sending.acquire(1).await;
        let mut batched = 0;
        for part in data.parts() {
            for piece in part.chunks(BATCH) {
                self.conn
                    .borrow_mut()
                    .writer()
                    .write_all(piece)
                    .map_err(|e| BlockError::new(ErrorKind::Io, format!("TLS: {e}")))?;
                batched += piece.len();
                if batched >= BATCH {
                    batched = 0;
                    self.send_pending().await?;
                }
            }
        }
        self.send_pending().await
    }

    async fn receive(&self, max: usize) -> Result<Bytes> {
        loop {
            {
                let mut plain = self.plain.borrow_mut();
                if !plain.is_empty() {
                    let n = plain.len().min(max);
                    return Ok(plain.split_to(n).freeze());
                }
            }
            let piece = self.below.recv(max.max(RECORD)).await?;
            if piece.is_empty() {
                return Ok(Bytes::new());
            }
            let taken = self.decrypt(&piece);
            // A key update wants an answer, an error an alert. Who is sending already takes it along.
            if let Some(_turn) = self.sending.try_acquire(1) {
                self.send_pending().await?;
            }
            taken.map_err(|e| BlockError::new(ErrorKind::Disconnected, format!("TLS: {e}")))?;
            if self.conn.borrow_mut().process_new_packets().is_ok_and(|s| s.peer_has_closed())
                && self.plain.borrow().is_empty()
            {
                return Ok(Bytes::new());
            }
        }
    }
}

impl Stream for TlsStream {
    fn recv(&self, max: usize) -> Io<'_, Bytes> {
        Box::pin(self.receive(max))
    }
    fn send(&self, data: Data) -> Io<'_> {
        Box::pin(self.encrypt_and_send(data))
    }
    fn shutdown(&self) {
        self.below.shutdown();
    }
    fn peer(&self) -> Option<Credentials> {
        self.below.peer()
    }
}
