//! Who may connect.
//!
//! A follower shows a [`Token`], a certificate (`access::tls`), both or nothing. When it has said
//! Hello, and before anything is done for it, the server asks its [`Authorize`]. Who is refused is
//! told why, and the connection ends.

use std::fmt;

use bytes::{BufMut, Bytes, BytesMut};
use subtle::ConstantTimeEq;

/// What a token's bytes begin with: a MessagePack `bin` of up to 255 bytes. No message does.
const BIN: u8 = 0xc4;

/// Decides who may follow.
///
/// It is called on the thread that serves the connection, once for each, and must not block. A panic
/// in it ends that connection.
///
/// ```
/// use tablecast_actors::{Applicant, Authorize};
///
/// /// Only those of the private network.
/// #[derive(Debug)]
/// struct Private;
///
/// impl Authorize for Private {
///     fn authorize(&self, follower: &Applicant<'_>) -> Result<(), String> {
///         let known = follower.address.starts_with("10.");
///         if known { Ok(()) } else { Err("not of this network".to_owned()) }
///     }
/// }
/// ```
pub trait Authorize: fmt::Debug + Send + Sync + 'static {
    /// Whether this follower is served.
    ///
    /// # Errors
    /// If it is not: why, in up to 1,024 bytes. The follower is told.
    fn authorize(&self, follower: &Applicant<'_>) -> Result<(), String>;
}

/// Who wants to follow.
#[derive(Clone, Copy, Debug)]
pub struct Applicant<'a> {
    /// Where it is, as its transport says: `IP:PORT` over TCP.
    pub address: &'a str,
    /// What it calls itself. Anybody can say anything.
    pub name: &'a str,
    /// What it has shown; `None` if nothing.
    pub token: Option<&'a Token>,
    /// Its certificate, DER, if it was asked for one: it has the key to it, and the chain has been checked.
    pub certificate: Option<&'a [u8]>,
}

/// Everybody may. For addresses that only this machine reaches, for a transport that knows its
/// followers, or for a table that is no secret.
#[derive(Clone, Copy, Debug)]
pub struct AllowAll;

impl Authorize for AllowAll {
    fn authorize(&self, _: &Applicant<'_>) -> Result<(), String> {
        Ok(())
    }
}

/// A secret that a server shares with its followers: 32 bytes from a good source of randomness, say. As an
/// [`Authorize`] it lets in who shows the same.
///
/// It goes over the connection as it is: without TLS whoever listens on the way has it. Nothing here prints it.
#[derive(Clone)]
pub struct Token(Bytes);

impl Token {
    /// Longest token, in bytes.
    pub const MAX_BYTES: usize = u8::MAX as usize;

    /// A token of these bytes.
    ///
    /// # Errors
    /// If there are none, or more than [`Token::MAX_BYTES`].
    pub fn new(bytes: impl Into<Bytes>) -> Result<Self, TokenError> {
        let bytes = bytes.into();
        match bytes.len() {
            1..=Self::MAX_BYTES => Ok(Self(bytes)),
            length => Err(TokenError(length)),
        }
    }

    /// The frame that is sent ahead of Hello.
    pub(crate) fn frame(&self) -> Bytes {
        let mut frame = BytesMut::with_capacity(6 + self.0.len());
        // `new` has seen to it.
        let length = u8::try_from(self.0.len()).expect("a token has up to 255 bytes");
        frame.put_u32(2 + u32::from(length));
        frame.put_u8(BIN);
        frame.put_u8(length);
        frame.put_slice(&self.0);
        frame.freeze()
    }

    /// The token in the payload of a frame, if it is one.
    pub(crate) fn parse(payload: &[u8]) -> Option<Self> {
        match payload {
            [BIN, length, token @ ..] if token.len() == usize::from(*length) => {
                Self::new(Bytes::copy_from_slice(token)).ok()
            }
            _ => None,
        }
    }
}

/// In a time that depends on both lengths alone.
impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(...)")
    }
}

impl Authorize for Token {
    fn authorize(&self, follower: &Applicant<'_>) -> Result<(), String> {
        match follower.token {
            Some(token) if token == self => Ok(()),
            Some(_) => Err("wrong token".to_owned()),
            None => Err("no token".to_owned()),
        }
    }
}

/// A token that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("token of {0} bytes; it must have 1 to {max}", max = Token::MAX_BYTES)]
pub struct TokenError(usize);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_crosses_the_wire_and_is_not_printed() {
        let token = Token::new("hunter2").unwrap();
        let frame = token.frame();
        assert_eq!(frame, &b"\0\0\0\x09\xc4\x07hunter2"[..]);
        let page = include_str!("../../docs/protocol.md");
        let hex = |frame: &[u8]| frame.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let example = format!("\ntoken = {}\n", hex(&Token::new("secret").unwrap().frame()));
        assert!(page.contains(&example), "{example}");
        assert_eq!(Token::parse(&frame[4..]), Some(token.clone()));
        assert_ne!(token, Token::new("hunter3").unwrap());
        assert_ne!(token, Token::new("hunter22").unwrap());
        assert_eq!(format!("{token:?}"), "Token(...)");
    }

    #[test]
    fn what_is_no_token() {
        for payload in [&b""[..], b"\xc4", b"\xc4\0", b"\xc4\x02a", b"\xc4\x01ab", b"\x98\0\x01"] {
            assert_eq!(Token::parse(payload), None, "{payload:?}");
        }
        assert_eq!(Token::new("").unwrap_err(), TokenError(0));
        let longest = vec![b't'; 255];
        let frame = Token::new(longest.clone()).unwrap().frame();
        assert_eq!(Token::parse(&frame[4..]), Some(Token::new(longest).unwrap()));
        let error = Token::new(vec![b't'; 256]).unwrap_err().to_string();
        assert_eq!(error, "token of 256 bytes; it must have 1 to 255");
    }
}
