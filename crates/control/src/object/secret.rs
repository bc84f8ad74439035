//! Secrets: bytes given directly or in a file, perhaps in base64, perhaps encrypted under another secret.
//!
//! The encryption is QEMU's: AES-256 in CBC mode with PKCS#7 padding, the key being a secret of 32 bytes.

use super::{Objects, text};
use crate::error::QmpError;
use aes::Aes256;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use block::Span;
use cbc::cipher::{BlockDecryptMut, KeyIvInit, block_padding::Pkcs7};
use env::{Env, OpenMode};
use qapi::{Map, Value};
use std::path::Path;
use std::rc::Rc;

/// Longest file with a secret: keys and pass phrases are short.
const MAX_FILE: u64 = 64 << 10;
/// Bytes of an AES-256 key.
const KEY: usize = 32;
/// Bytes of an AES block.
const BLOCK: usize = 16;

fn refused(why: impl Into<String>) -> QmpError {
    QmpError::generic(why)
}

fn base64(text: &[u8]) -> Result<Vec<u8>, QmpError> {
    let packed: Vec<u8> = text.iter().copied().filter(|c| !c.is_ascii_whitespace()).collect();
    STANDARD.decode(packed).map_err(|_| refused("Base64 data contains invalid characters"))
}

/// The bytes that these properties describe.
pub(super) async fn read(env: &Env, others: &Objects, p: &Map<String, Value>) -> Result<Rc<[u8]>, QmpError> {
    let given = match (text(p, "file"), text(p, "data")) {
        (Some(_), Some(_)) => return Err(refused("'file' and 'data' are mutually exclusive")),
        (None, None) => return Err(refused("Either 'file' or 'data' must be provided")),
        (Some(path), None) => file(env, path).await?,
        (None, Some(data)) => data.as_bytes().to_vec(),
    };
    let in_base64 = text(p, "format") == Some("base64");
    let bytes = match text(p, "keyid") {
        Some(id) => {
            let key = others.secret(id)?;
            let given = if in_base64 { base64(&given)? } else { given };
            return decrypt(&key, text(p, "iv"), given).map(Rc::from);
        }
        None if in_base64 => base64(&given)?,
        None => given,
    };
    Ok(Rc::from(bytes))
}

async fn file(env: &Env, path: &str) -> Result<Vec<u8>, QmpError> {
    let unreadable = |e: &dyn std::fmt::Display| refused(format!("Unable to read {path}: {e}"));
    let file = env.open(Path::new(path), OpenMode::default()).await.map_err(|e| unreadable(&e.message()))?;
    let len = file.len_hint();
    if len > MAX_FILE {
        return Err(unreadable(&format!("it has {len} bytes, more than {MAX_FILE}")));
    }
    let data = file.read(Span::new(0, len)).await.map_err(|e| unreadable(&e.message()))?;
    Ok(data.to_vec())
}

fn decrypt(key: &[u8], iv: Option<&str>, mut bytes: Vec<u8>) -> Result<Vec<u8>, QmpError> {
    let key: &[u8; KEY] =
        key.try_into().map_err(|_| refused(format!("Key should be {KEY} bytes in length")))?;
    let iv = base64(iv.ok_or_else(|| refused("IV is required to decrypt secret"))?.as_bytes())?;
    let iv: [u8; BLOCK] = iv
        .try_into()
        .map_err(|v: Vec<u8>| refused(format!("IV should be {BLOCK} bytes in length not {}", v.len())))?;
    if !bytes.len().is_multiple_of(BLOCK) {
        return Err(refused(format!("Length {} must be a multiple of block size {BLOCK}", bytes.len())));
    }
    let plain = cbc::Decryptor::<Aes256>::new(key.into(), &iv.into())
        .decrypt_padded_mut::<Pkcs7>(&mut bytes)
        .map_err(|_| refused("Incorrect number of padding bytes found on decrypted data"))?;
    Ok(plain.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_openssl_encrypted_is_read() {
        // printf secret | openssl enc -aes-256-cbc -K 3030..30 -iv 3131..31 | base64
        let out = std::process::Command::new("sh")
            .args(["-c", "printf 'a secret' | openssl enc -aes-256-cbc -K $(printf '30%.0s' $(seq 32)) -iv $(printf '31%.0s' $(seq 16))"])
            .output()
            .expect("openssl");
        let iv = STANDARD.encode([b'1'; 16]);
        assert_eq!(decrypt(&[b'0'; 32], Some(&iv), out.stdout.clone()).unwrap(), b"a secret");
        let wrong = decrypt(&[b'1'; 32], Some(&iv), out.stdout);
        assert!(wrong.is_err() || wrong.unwrap() != b"a secret");
        for (key, iv, bytes, why) in [
            (&[0_u8; 31][..], Some(iv.as_str()), vec![0; 16], "Key should be 32 bytes"),
            (&[0; 32], None, vec![0; 16], "IV is required"),
            (&[0; 32], Some("AAAA"), vec![0; 16], "IV should be 16 bytes in length not 3"),
            (&[0; 32], Some("!"), vec![0; 16], "invalid characters"),
            (&[0; 32], Some(iv.as_str()), vec![0; 15], "Length 15 must be a multiple"),
        ] {
            let e = decrypt(key, iv, bytes).unwrap_err();
            assert!(e.desc.contains(why), "{why}: {}", e.desc);
        }
    }
}
