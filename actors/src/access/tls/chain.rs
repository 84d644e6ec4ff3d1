//! Certificates are looked at only in short chains.
//!
//! How long it takes to find a way from a certificate to a CA grows with the factorial of how many of one name lie between, and
//! whoever connects decides that before anything is known of it: 9 certificates of one name and 130 others, 47 kB, took
//! 0.86 s of a thread that serves followers; 4 take 0.05 ms.

use std::fmt;
use std::sync::Arc;

use super::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use super::rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use super::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use super::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};

/// Most certificates between that of an end and one of a CA. Chains in use have one or two.
const MAX_INTERMEDIATES: usize = 4;

/// Asks another verifier about short chains, and refuses the others.
#[derive(Debug)]
pub(super) struct ShortChains<V: ?Sized>(pub(super) Arc<V>);

/// More certificates came than are looked at.
#[derive(thiserror::Error)]
#[error("{0} intermediate certificates; the limit is {MAX_INTERMEDIATES}")]
struct LongChain(usize);

/// That is how rustls says what is wrong with a certificate.
impl fmt::Debug for LongChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn check(intermediates: &[CertificateDer<'_>]) -> Result<(), Error> {
    match intermediates.len() {
        0..=MAX_INTERMEDIATES => Ok(()),
        long => {
            let error = OtherError(Arc::new(LongChain(long)));
            Err(Error::InvalidCertificate(CertificateError::Other(error)))
        }
    }
}

impl ClientCertVerifier for ShortChains<dyn ClientCertVerifier> {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        check(intermediates)?;
        self.0.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl<V: ServerCertVerifier> ServerCertVerifier for ShortChains<V> {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        check(intermediates)?;
        self.0.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
