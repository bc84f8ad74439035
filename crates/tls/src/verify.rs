//! Who the peer has to be.
//!
//! A server's certificate must chain to the authority and, where a host name is known, be for that name. Certificates
//! without subject alternative names are still in use with QEMU (GnuTLS compares the common name then), so that is done
//! here too; `rustls` alone would refuse them.

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use std::sync::Arc;
use x509_cert::Certificate;
use x509_cert::der::{Decode, asn1::ObjectIdentifier};

/// id-ce-subjectAltName (RFC 5280, 4.2.1.6).
const SUBJECT_ALT_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.29.17");
/// id-at-commonName (RFC 5280, appendix A.1).
const COMMON_NAME: ObjectIdentifier = ObjectIdentifier::new_unwrap("2.5.4.3");

/// The name to give to the library where none is known: an address, which is not sent to the server and which no
/// certificate is for.
pub(crate) fn nobody() -> ServerName<'static> {
    ServerName::IpAddress(core::net::Ipv4Addr::UNSPECIFIED.into())
}

/// The name that a server's certificate must be for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PeerName {
    /// Any: no host name is known (a unix socket).
    Any,
    /// This host name or address.
    Host(String),
}

impl PeerName {
    /// From a host name, if there is one.
    pub fn of(host: Option<&str>) -> PeerName {
        host.map_or(PeerName::Any, |h| PeerName::Host(h.to_owned()))
    }
}

/// The check of a server's certificate.
#[derive(Debug)]
pub(crate) struct ServerIdentity {
    /// `None`: the user trusts whoever answers.
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
    name: PeerName,
}

impl ServerIdentity {
    pub(crate) fn new(
        chain: Option<Arc<WebPkiServerVerifier>>,
        provider: &Arc<CryptoProvider>,
        name: PeerName,
    ) -> ServerIdentity {
        ServerIdentity { chain, provider: provider.clone(), name }
    }

    /// Only whether the certificate chains to the authority.
    pub(crate) fn chain_only(
        verifier: &WebPkiServerVerifier,
        end: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        match verifier.verify_server_cert(end, rest, &nobody(), &[], now) {
            // The library compares names last, when all else has been found right (a test holds it to that).
            Ok(_) => Ok(()),
            Err(e) if is_name_mismatch(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }
}

fn is_name_mismatch(e: &Error) -> bool {
    matches!(
        e,
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }
        )
    )
}

impl ServerCertVerifier for ServerIdentity {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        server: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        let PeerName::Host(host) = &self.name else {
            ServerIdentity::chain_only(chain, end, rest, now)?;
            return Ok(ServerCertVerified::assertion());
        };
        match chain.verify_server_cert(end, rest, server, ocsp, now) {
            Err(e) if is_name_mismatch(&e) && only_common_name_is(end, host) => {
                Ok(ServerCertVerified::assertion())
            }
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Whether the certificate names nobody but by its common name, and that is `host`.
fn only_common_name_is(end: &CertificateDer<'_>, host: &str) -> bool {
    let Ok(cert) = Certificate::from_der(end) else { return false };
    let tbs = &cert.tbs_certificate;
    let named_otherwise =
        tbs.extensions.as_ref().is_some_and(|all| all.iter().any(|x| x.extn_id == SUBJECT_ALT_NAME));
    let mut parts = tbs.subject.0.iter().flat_map(|rdn| rdn.0.iter());
    !named_otherwise
        && parts
            .any(|part| part.oid == COMMON_NAME && part.value.value().eq_ignore_ascii_case(host.as_bytes()))
}

/// The distinguished name of a certificate's subject as RFC 4514 writes it, most specific part first: what
/// authorisation lists compare with.
pub(crate) fn distinguished_name(cert: &CertificateDer<'_>) -> Option<String> {
    Certificate::from_der(cert).ok().map(|c| c.tbs_certificate.subject.to_string())
}

/// A verifier's answer in words.
pub(crate) fn certificate_problem(answer: Result<(), Error>) -> Result<(), String> {
    answer.map_err(|e| match e {
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "The certificate has expired".to_owned()
        }
        Error::InvalidCertificate(
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. },
        ) => "The certificate is not yet activated".to_owned(),
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "The certificate is not signed by an authority of ca-cert.pem".to_owned()
        }
        Error::InvalidCertificate(CertificateError::Revoked) => "The certificate is revoked".to_owned(),
        e => e.to_string(),
    })
}
