//! Connections over TLS 1.3, by rustls: a layer over another transport, TCP as a rule.
//!
//! The server shows a certificate, and may ask for one: with a CA of its own for followers, only they come
//! as far as Hello. Nothing is resumed, and no data is sent early. Certificates are read once;
//! revocation lists are not looked at. More than four certificates between an end's and a CA's are refused.
//!
//! ```no_run
//! use tablecast_actors::access::tcp::{TcpAccess, TcpListener};
//! use tablecast_actors::access::tls::{TlsAccess, TlsListener, client_config, server_config};
//!
//! # fn main() -> std::io::Result<()> {
//! let read = std::fs::read;
//! let config = server_config(&read("server.pem")?, &read("server.key")?, None)?;
//! let listener = TlsListener::new(TcpListener::bind("0.0.0.0:7400")?, config);
//! let config = client_config(&read("ca.pem")?, None)?;
//! let access = TlsAccess::new(TcpAccess::new("table.example:7400"), "table.example", config)?;
//! # Ok(())
//! # }
//! ```

mod chain;

use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::io::AsyncWriteExt;
pub use tokio_rustls::rustls;
use tokio_rustls::rustls::client::WebPkiServerVerifier;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::version::TLS13;
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use self::chain::ShortChains;
use super::codec::LAST_WORDS;
use super::{Access, Handshaken, Incoming, Listener, Stream};

/// Where a server listens, under TLS.
pub struct TlsListener<L> {
    inner: L,
    acceptor: TlsAcceptor,
}

/// Where a follower's server is, under TLS.
pub struct TlsAccess<A> {
    inner: A,
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// TLS 1.3 with this certificate, and the chain behind it, and its key, PEM. With a CA (PEM, one or several)
/// only followers with a certificate of it are let in.
///
/// # Errors
/// If any of it cannot be read, or does not belong together.
pub fn server_config(
    certificate: &[u8],
    key: &[u8],
    client_ca: Option<&[u8]>,
) -> io::Result<Arc<ServerConfig>> {
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(invalid)?;
    let builder = match client_ca {
        Some(ca) => {
            let roots = Arc::new(roots(ca)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
            let verifier = ShortChains(verifier.build().map_err(invalid)?);
            builder.with_client_cert_verifier(Arc::new(verifier))
        }
        None => builder.with_no_client_auth(),
    };
    let (chain, key) = identity(certificate, key)?;
    let mut config = builder.with_single_cert(chain, key).map_err(invalid)?;
    // Nobody resumes: a connection lasts.
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// TLS 1.3 with a server whose certificate is of this CA (PEM, one or several); with a certificate and its key
/// if the server asks for one.
///
/// # Errors
/// If any of it cannot be read, or does not belong together.
pub fn client_config(
    ca: &[u8],
    certificate_and_key: Option<(&[u8], &[u8])>,
) -> io::Result<Arc<ClientConfig>> {
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots(ca)?), provider());
    let verifier = ShortChains(verifier.build().map_err(invalid)?);
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(invalid)?
        // It asks the usual one.
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let config = match certificate_and_key {
        Some((certificate, key)) => {
            let (chain, key) = identity(certificate, key)?;
            builder.with_client_auth_cert(chain, key).map_err(invalid)?
        }
        None => builder.with_no_client_auth(),
    };
    Ok(Arc::new(config))
}

/// Whatever else the process links.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

fn certificates(pem: &[u8]) -> io::Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(invalid("no certificate found")),
        found => found.map_err(invalid),
    }
}

fn roots(pem: &[u8]) -> io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate).map_err(invalid)?;
    }
    Ok(roots)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

fn identity(certificate: &[u8], key: &[u8]) -> io::Result<Identity> {
    Ok((certificates(certificate)?, PrivateKeyDer::from_pem_slice(key).map_err(invalid)?))
}

impl<L: Listener> TlsListener<L> {
    /// TLS over what this listener accepts.
    pub fn new(inner: L, config: Arc<ServerConfig>) -> Self {
        Self { inner, acceptor: config.into() }
    }
}

impl<A: Access> TlsAccess<A> {
    /// TLS over what this access reaches. The server's certificate must be of this name, an IP address or one
    /// of DNS.
    ///
    /// # Errors
    /// If it is neither.
    pub fn new(inner: A, name: &str, config: Arc<ClientConfig>) -> io::Result<Self> {
        let name = ServerName::try_from(name.to_owned()).map_err(invalid)?;
        Ok(Self { inner, connector: config.into(), name })
    }
}

async fn handshake(acceptor: TlsAcceptor, stream: Box<dyn Stream>) -> io::Result<Handshaken> {
    match acceptor.accept(stream).into_fallible().await {
        Ok(stream) => {
            let certificates = stream.get_ref().1.peer_certificates();
            let certificate = certificates.and_then(<[_]>::first);
            let certificate = certificate.map(|certificate| Bytes::copy_from_slice(certificate));
            Ok((Box::new(stream), certificate))
        }
        Err((error, mut stream)) => {
            // A socket that is closed while something is unread takes the alert with it.
            let heard = async {
                stream.shutdown().await?;
                tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
            };
            tokio::time::timeout(LAST_WORDS, heard).await.ok();
            Err(error)
        }
    }
}

impl<L: Listener> Listener for TlsListener<L> {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Incoming>> {
        let acceptor = self.acceptor.clone();
        let accepting = self.inner.accept();
        async move { Ok(accepting.await?.with_handshake(|stream| handshake(acceptor, stream))) }
            .boxed()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

impl<A: Access> Access for TlsAccess<A> {
    fn connect(&self) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
        let (connector, name) = (self.connector.clone(), self.name.clone());
        let connecting = self.inner.connect();
        async move {
            let stream = connector.connect(name, connecting.await?).await?;
            Ok(Box::new(stream) as Box<dyn Stream>)
        }
        .boxed()
    }

    fn address(&self) -> String {
        self.inner.address()
    }
}

impl<L: Listener> fmt::Debug for TlsListener<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsListener").field("address", &self.address()).finish_non_exhaustive()
    }
}

impl<A: Access> fmt::Debug for TlsAccess<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsAccess").field("address", &self.address()).finish_non_exhaustive()
    }
}
