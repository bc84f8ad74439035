//! x509 credentials: the files of a directory, read and checked once.
//!
//! The directory has `ca-cert.pem`, and `server-cert.pem` with `server-key.pem` or `client-cert.pem` with
//! `client-key.pem` (a client may have none), and perhaps `ca-crl.pem`: QEMU's names, so that a directory made for QEMU
//! works. What can happen: files that are missing, unreadable, not PEM, of another key, out of date, or not signed by the
//! authority beside them. Each is told with the file's name.

use crate::stream::TlsStream;
use crate::verify::{PeerName, ServerIdentity, certificate_problem, nobody};
use block::{BlockError, ErrorKind, Result, Span};
use env::{Env, OpenMode, Stream};
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime,
};
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

/// Longest file that is read. A bundle of all public authorities has a quarter of that.
const MAX_FILE: u64 = 1 << 20;

/// Which end of connections the credentials are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Endpoint {
    /// Who connects.
    Client,
    /// Who listens.
    Server,
}

/// What the user says of x509 credentials; names as in QMP's `tls-creds-x509`.
#[derive(Clone, Debug)]
pub struct X509Options {
    /// The directory with the files.
    pub dir: PathBuf,
    /// Which end.
    pub endpoint: Endpoint,
    /// Whether the peer must prove who it is.
    pub verify_peer: bool,
    /// Whether our own certificate is checked against the authority when it is loaded.
    pub sanity_check: bool,
    /// The pass phrase of an encrypted private key.
    pub password: Option<Vec<u8>>,
}

enum Side {
    Server(Arc<ServerConfig>),
    Client { verifier: Option<Arc<WebPkiServerVerifier>>, own: Option<Arc<CertifiedKey>> },
}

/// Credentials ready for use.
pub struct Credentials {
    provider: Arc<CryptoProvider>,
    side: Side,
}

struct Own {
    path: PathBuf,
    chain: Vec<CertificateDer<'static>>,
    key: Arc<CertifiedKey>,
}

impl Credentials {
    /// Reads and checks the files.
    ///
    /// # Errors
    /// What is wrong with which file.
    pub async fn load(env: &Env, o: &X509Options) -> Result<Credentials> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let ca_path = o.dir.join("ca-cert.pem");
        let roots = Arc::new(authorities(&ca_path, &need(env, &ca_path).await?)?);
        let crls = revocations(env, &o.dir.join("ca-crl.pem")).await?;
        let side = match o.endpoint {
            Endpoint::Server => {
                let own = own(env, o, "server", &provider).await?;
                let own = own.ok_or_else(|| missing(&o.dir.join("server-cert.pem")))?;
                if o.sanity_check {
                    let v = server_verifier(&roots, &crls, &provider)?;
                    check_own(&own, |end, rest, now| {
                        certificate_problem(ServerIdentity::chain_only(&v, end, rest, now))
                    })?;
                }
                Side::Server(server_config(o, &own, &roots, &crls, &provider)?)
            }
            Endpoint::Client => {
                let own = own(env, o, "client", &provider).await?;
                if let Some(own) = own.as_ref().filter(|_| o.sanity_check) {
                    let v = client_verifier(&roots, &crls, &provider)?;
                    check_own(own, |end, rest, now| {
                        certificate_problem(v.verify_client_cert(end, rest, now).map(drop))
                    })?;
                }
                let verifier =
                    if o.verify_peer { Some(server_verifier(&roots, &crls, &provider)?) } else { None };
                Side::Client { verifier, own: own.map(|o| o.key) }
            }
        };
        Ok(Credentials { provider, side })
    }

    /// Which end they are for.
    pub fn endpoint(&self) -> Endpoint {
        match self.side {
            Side::Server(_) => Endpoint::Server,
            Side::Client { .. } => Endpoint::Client,
        }
    }

    /// The server's handshake over `stream`.
    ///
    /// # Errors
    /// The peer did not prove who it is, spoke something else, or went away; `Invalid` for a client's credentials.
    pub async fn accept(&self, stream: Rc<dyn Stream>) -> Result<Rc<TlsStream>> {
        let Side::Server(config) = &self.side else {
            return Err(BlockError::invalid("Expected TLS credentials for a server endpoint"));
        };
        let conn = ServerConnection::new(config.clone()).map_err(|e| unusable(&e))?;
        TlsStream::shake(stream, conn.into()).await
    }

    /// The client's handshake over `stream`. The server's certificate has to be for `host`, if that is given.
    ///
    /// # Errors
    /// The peer did not prove who it is, spoke something else, or went away; `Invalid` for a server's credentials or
    /// a `host` that can be no name.
    pub async fn connect(&self, stream: Rc<dyn Stream>, host: Option<&str>) -> Result<Rc<TlsStream>> {
        let Side::Client { verifier, own } = &self.side else {
            return Err(BlockError::invalid("Expected TLS credentials for a client endpoint"));
        };
        let name = match host {
            Some(h) => ServerName::try_from(h.to_owned())
                .map_err(|_| BlockError::invalid(format!("tls-hostname '{h}' is no host name or address")))?,
            None => nobody(),
        };
        let identity = ServerIdentity::new(verifier.clone(), &self.provider, PeerName::of(host));
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|e| unusable(&e))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(identity));
        let config = match own {
            Some(key) => {
                builder.with_client_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key.clone())))
            }
            None => builder.with_no_client_auth(),
        };
        let conn = ClientConnection::new(Arc::new(config), name).map_err(|e| unusable(&e))?;
        TlsStream::shake(stream, conn.into()).await
    }
}

fn unusable(e: &rustls::Error) -> BlockError {
    BlockError::invalid(format!("TLS credentials cannot be used: {e}"))
}

fn missing(path: &Path) -> BlockError {
    let gone = BlockError::from_errno(BlockError::ENOENT);
    let said = format!("Unable to access credentials {}: {}", path.display(), gone.message());
    gone.with_message(said)
}

/// The content of a file, `None` if there is none.
async fn read(env: &Env, path: &Path) -> Result<Option<Vec<u8>>> {
    let named = |e: BlockError| {
        let said = e.message().to_owned();
        e.with_message(format!("Unable to access credentials {}: {said}", path.display()))
    };
    let file = match env.open(path, OpenMode::default()).await {
        Ok(f) => f,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(named(e)),
    };
    let len = file.len_hint();
    if len > MAX_FILE {
        let why = format!("the file has {len} bytes, more than {MAX_FILE}");
        return Err(named(BlockError::invalid(why)));
    }
    let data = file.read(Span::new(0, len)).await.map_err(named)?;
    Ok(Some(data.to_vec()))
}

async fn need(env: &Env, path: &Path) -> Result<Vec<u8>> {
    read(env, path).await?.ok_or_else(|| missing(path))
}

fn authorities(path: &Path, pem: &[u8]) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(path, "CA certificate list", pem)? {
        roots.add(cert).map_err(|e| unreadable("CA certificate list", path, e))?;
    }
    Ok(roots)
}

fn unreadable(what: &str, path: &Path, why: impl std::fmt::Display) -> BlockError {
    BlockError::invalid(format!("Unable to import {what} {}: {why}", path.display()))
}

fn certificates(path: &Path, what: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>> {
    let found: std::result::Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(c) if !c.is_empty() => Ok(c),
        Ok(_) => Err(unreadable(what, path, "there is no certificate in it")),
        Err(e) => Err(unreadable(what, path, e)),
    }
}

async fn revocations(env: &Env, path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>> {
    let Some(pem) = read(env, path).await? else { return Ok(Vec::new()) };
    let found: std::result::Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
    found.map_err(|e| unreadable("CRL", path, e))
}

/// Certificate and key of our own end; `None` if there is neither.
async fn own(env: &Env, o: &X509Options, who: &str, provider: &CryptoProvider) -> Result<Option<Own>> {
    let (path, key_path) = (o.dir.join(format!("{who}-cert.pem")), o.dir.join(format!("{who}-key.pem")));
    let (pem, key_pem) = match (read(env, &path).await?, read(env, &key_path).await?) {
        (None, None) => return Ok(None),
        (None, Some(_)) => return Err(missing(&path)),
        (Some(_), None) => return Err(missing(&key_path)),
        (Some(pem), Some(key)) => (pem, key),
    };
    let chain = certificates(&path, &format!("{who} certificate"), &pem)?;
    let key = private_key(&key_path, &key_pem, o.password.as_deref())?;
    let both = |e: &dyn std::fmt::Display| {
        let (cert, key) = (path.display(), key_path.display());
        BlockError::invalid(format!("Cannot load certificate '{cert}' & key '{key}': {e}"))
    };
    let key = CertifiedKey::from_der(chain.clone(), key, provider).map_err(|e| match e {
        rustls::Error::InconsistentKeys(_) => both(&"The certificate and the given key do not match."),
        e => both(&e),
    })?;
    Ok(Some(Own { path, chain, key: Arc::new(key) }))
}

fn private_key(path: &Path, pem: &[u8], password: Option<&[u8]>) -> Result<PrivateKeyDer<'static>> {
    let text = String::from_utf8_lossy(pem);
    if !text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
        return PrivateKeyDer::from_pem_slice(pem).map_err(|e| unreadable("private key", path, e));
    }
    let password = password
        .ok_or_else(|| unreadable("private key", path, "it is encrypted and there is no passwordid"))?;
    let bad = |e: &dyn std::fmt::Display| unreadable("private key", path, format!("cannot decrypt it: {e}"));
    let (_, document) = pkcs8::SecretDocument::from_pem(text.trim_start()).map_err(|e| bad(&e))?;
    let encrypted = pkcs8::EncryptedPrivateKeyInfo::try_from(document.as_bytes()).map_err(|e| bad(&e))?;
    let plain = encrypted.decrypt(password).map_err(|e| bad(&e))?;
    Ok(PrivatePkcs8KeyDer::from(plain.as_bytes().to_vec()).into())
}

fn server_verifier(
    roots: &Arc<RootCertStore>,
    crls: &[CertificateRevocationListDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>> {
    let builder = WebPkiServerVerifier::builder_with_provider(roots.clone(), provider.clone());
    let builder = builder.with_crls(crls.iter().cloned()).allow_unknown_revocation_status();
    builder.build().map_err(|e| BlockError::invalid(format!("TLS credentials cannot be used: {e}")))
}

fn client_verifier(
    roots: &Arc<RootCertStore>,
    crls: &[CertificateRevocationListDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn rustls::server::danger::ClientCertVerifier>> {
    let builder = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone());
    let builder = builder.with_crls(crls.iter().cloned()).allow_unknown_revocation_status();
    builder.build().map_err(|e| BlockError::invalid(format!("TLS credentials cannot be used: {e}")))
}

fn server_config(
    o: &X509Options,
    own: &Own,
    roots: &Arc<RootCertStore>,
    crls: &[CertificateRevocationListDer<'static>],
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<ServerConfig>> {
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| unusable(&e))?;
    let builder = if o.verify_peer {
        builder.with_client_cert_verifier(client_verifier(roots, crls, provider)?)
    } else {
        builder.with_no_client_auth()
    };
    let resolver = rustls::sign::SingleCertAndKey::from(own.key.clone());
    let mut config = builder.with_cert_resolver(Arc::new(resolver));
    // A disk's connections are few and long: tickets would only be messages to send.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// Whether our own certificate would be accepted by who trusts the authority beside it.
fn check_own(
    own: &Own,
    check: impl Fn(&CertificateDer<'_>, &[CertificateDer<'_>], UnixTime) -> std::result::Result<(), String>,
) -> Result<()> {
    let Some((end, rest)) = own.chain.split_first() else { return Ok(()) };
    check(end, rest, UnixTime::now()).map_err(|why| {
        let path = own.path.display();
        BlockError::invalid(format!("Our own certificate {path} failed validation against the CA: {why}"))
    })
}
