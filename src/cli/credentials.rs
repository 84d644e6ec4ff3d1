//! What the ends show each other: tokens and certificates, from files.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};

use super::{Credentials, Failure, Serve};
use crate::Token;
use crate::access::Access;
use crate::access::tcp::TcpAccess;
use crate::access::tls::{TlsAccess, client_config, rustls, server_config};

/// How to reach the server at HOST:PORT.
pub(super) fn access(connect: &str, args: &Credentials) -> Result<Box<dyn Access>, Failure> {
    let tcp = TcpAccess::new(connect);
    let Some(ca) = &args.tls_ca else { return Ok(Box::new(tcp)) };
    let identity = match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
        _ => None,
    };
    let identity = identity.as_ref().map(|(certificate, key)| (&**certificate, &**key));
    let files = [Some(ca), args.tls_cert.as_ref(), args.tls_key.as_ref()];
    let config = client_config(&read(ca)?, identity);
    let config = config.with_context(|| tls_of(files)).map_err(Failure::Input)?;
    let host = connect.rsplit_once(':').map_or(connect, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let access = TlsAccess::new(tcp, host, config);
    let access = access.with_context(|| format!("TLS with {host:?}")).map_err(Failure::Input)?;
    Ok(Box::new(access))
}

/// Which files it is about.
fn tls_of(files: [Option<&PathBuf>; 3]) -> String {
    let files: Vec<_> =
        files.into_iter().flatten().map(|file| file.display().to_string()).collect();
    format!("TLS of {}", files.join(", "))
}

/// The token in a file, without the ends of its lines.
pub(super) fn token(path: Option<&Path>) -> Result<Option<Token>, Failure> {
    let Some(path) = path else { return Ok(None) };
    let mut bytes = read(path)?;
    while bytes.pop_if(|last| matches!(last, b'\n' | b'\r')).is_some() {}
    if bytes.trim_ascii().is_empty() {
        // One of blanks is one that somebody forgot to write.
        bytes.clear();
    }
    let token = Token::new(bytes).with_context(|| path.display().to_string());
    Ok(Some(token.map_err(Failure::Input)?))
}

/// What a server shows its followers; `None` is that there is no TLS.
pub(super) fn tls(args: &Serve) -> Result<Option<Arc<rustls::ServerConfig>>, Failure> {
    let (Some(certificate), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(None) };
    let ca = args.tls_ca.as_deref().map(read).transpose()?;
    let config = server_config(&read(certificate)?, &read(key)?, ca.as_deref());
    let files = [Some(certificate), Some(key), args.tls_ca.as_ref()];
    Ok(Some(config.with_context(|| tls_of(files)).map_err(Failure::Input)?))
}

/// Whoever reaches the address would have the table: that is refused, unless it is meant. Before anything is
/// done: an address that is none is said to be so when it is listened at.
pub(super) fn check(args: &Serve) -> Result<(), Failure> {
    let mut addresses = args.listen.to_socket_addrs().into_iter().flatten();
    addresses.try_for_each(|at| check_at(args, &at))
}

/// The same of the address at which it is listened.
pub(super) fn check_at(args: &Serve, at: &SocketAddr) -> Result<(), Failure> {
    let asks = args.token_file.is_some() || args.tls_ca.is_some();
    if asks || args.insecure || is_local(at) {
        return Ok(());
    }
    Err(Failure::Input(anyhow!(
        "whoever reaches {} could follow: ask for a token (--token-file) or for certificates (--tls-ca), \
         or say that it is meant (--insecure)",
        args.listen
    )))
}

/// Only this machine reaches it, or is there.
pub(super) fn is_local(at: &SocketAddr) -> bool {
    // An IPv4 address may come in the clothes of an IPv6 one.
    at.ip().to_canonical().is_loopback()
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let read = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    read.map_err(Failure::Input)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::args::{Cli, Command};

    #[test]
    fn only_who_asks_whom_it_serves_listens_where_others_reach_it() {
        let token = ["--token-file", "t"];
        let certificate = ["--tls-cert", "c", "--tls-key", "k"];
        let all = [&certificate[..], &["--tls-ca", "ca"]].concat();
        for (options, asks) in [
            (&[][..], false),
            (&certificate, false),
            (&token, true),
            (&all, true),
            (&["--insecure"], true),
        ] {
            for (address, local) in [
                ("127.0.0.1:0", true),
                ("127.1.2.3:0", true),
                ("[::1]:0", true),
                ("[::ffff:127.0.0.1]:0", true),
                ("0.0.0.0:0", false),
                ("[::]:0", false),
                ("10.0.0.1:0", false),
                ("[::ffff:10.0.0.1]:0", false),
            ] {
                let line = [&["tablecast", "serve", "--listen", address], options].concat();
                let Command::Serve(args) = Cli::parse_from(line).command else { unreachable!() };
                let (at, may) = (address.parse().unwrap(), local || asks);
                assert_eq!(check_at(&args, &at).is_ok(), may, "{address} {options:?}");
                assert_eq!(check(&args).is_ok(), may, "{address} {options:?}");
            }
        }
    }
}
