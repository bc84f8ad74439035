//! The wire: what goes in comes out, in pieces of any size; and whatever else comes in is an error, not a panic and not memory.
//! `SEED=n` repeats a run.
#![allow(missing_docs, clippy::unwrap_used)]

use block::{Data, Span};
use bytes::Bytes;
use replication::ack::AckLevel;
use replication::digest::Digest;
use replication::history::History;
use replication::primary::LinkPolicy;
use replication::wire::{
    Ack, Body, Decoder, Doubt, Frame, HEADER, HandOver, Hello, MAX_PAYLOAD, Reject, VolumeInfo, Welcome,
    crc_of,
};
use replication::{Epoch, Generation, GroupId, Seq};
use sim::Rng;

fn seed() -> u64 {
    let seed = std::env::var("SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    println!("SEED={seed}");
    seed
}

fn history(rng: &mut Rng) -> History {
    let mut h = History::begin(Generation(1));
    for i in 0..rng.below(4) {
        h.advance(Epoch(h.epoch().0 + rng.below(5)));
        let at = Epoch(rng.below(h.epoch().0 + 1).max(h.past().last().map_or(0, |p| p.1.0)));
        h.promote(Generation(h.generation().0 + 1 + i), at);
    }
    if rng.chance(0.1) { History::none() } else { h }
}

fn doubt(rng: &mut Rng) -> Doubt {
    let places = (0..rng.below(5)).map(|_| (rng.draw() as u16, Span::new(rng.draw() >> 2, rng.draw() >> 2)));
    let places: Vec<_> = places.collect();
    Doubt {
        former: if rng.chance(0.5) { Some((history(rng), Epoch(rng.draw()))) } else { None },
        places: if rng.chance(0.8) { Some(places) } else { None },
    }
}

fn body(rng: &mut Rng) -> Body {
    let text = |rng: &mut Rng| "é".repeat(rng.index(80));
    let digest = |rng: &mut Rng| Digest { count: rng.draw(), bytes: rng.draw(), sum: rng.draw() };
    match rng.below(22) {
        0 => Body::Hello(Box::new(Hello {
            group: GroupId::of_name(&format!("g{}", rng.below(100))),
            history: history(rng),
            volumes: (0..rng.below(5)).map(|_| VolumeInfo { len: rng.draw() }).collect(),
        })),
        1 => Body::Welcome(Box::new(Welcome { history: history(rng), limit: rng.draw(), doubt: doubt(rng) })),
        2 => Body::Reject {
            why: *rng.choose(&[
                Reject::WrongGroup,
                Reject::Fenced(Generation(7)),
                Reject::Unrelated,
                Reject::SplitBrain,
                Reject::Volumes,
                Reject::Busy,
            ]),
            text: text(rng),
        },
        3 => {
            let bytes: Vec<u8> = (0..1 + rng.below(9000)).map(|_| rng.draw() as u8).collect();
            let mut data = Data::copy_from(&bytes[..bytes.len() / 2]);
            data.push(Bytes::copy_from_slice(&bytes[bytes.len() / 2..]));
            Body::Write {
                volume: rng.draw() as u16,
                offset: rng.draw() >> 1,
                crc: crc_of(&data),
                data,
                catch_up: rng.chance(0.5),
                fua: rng.chance(0.5),
            }
        }
        4 => Body::Zero {
            volume: rng.draw() as u16,
            at: Span::new(rng.draw() >> 1, 1 + rng.below(1 << 30)),
            unmap: rng.chance(0.5),
            catch_up: rng.chance(0.5),
        },
        5 => Body::Flush,
        6 => Body::Ack(Ack {
            received: Seq(rng.draw()),
            written: Seq(rng.draw()),
            durable: Seq(rng.draw()),
            applied: Seq(rng.draw()),
            limit: rng.draw(),
            fill: 50,
        }),
        7 => Body::Nack { volume: 3, offset: rng.draw(), errno: 28, text: text(rng) },
        8 => Body::Mark { digest: digest(rng) },
        9 => Body::Prepared,
        10 => Body::Veto { text: text(rng) },
        11 => Body::Commit,
        12 => Body::Abort,
        13 => Body::Committed { epoch_digest: digest(rng) },
        14 => Body::Ping { sent: rng.draw() },
        15 => Body::Pong { sent: rng.draw() },
        18 => Body::HashReq { volume: 3, at: Span::new(rng.draw() >> 1, 1 + rng.below(1 << 20)) },
        19 => {
            Body::Hash { volume: 3, at: Span::new(rng.draw() >> 1, 1 + rng.below(1 << 20)), hash: rng.draw() }
        }
        17 => Body::HandOver(Box::new(HandOver {
            name: text(rng),
            address: text(rng),
            write_level: *rng.choose(&AckLevel::ALL),
            flush_level: *rng.choose(&AckLevel::ALL),
            min_acks: rng.draw() as u16,
            policy: *rng.choose(&LinkPolicy::ALL),
            interval_ms: rng.draw(),
            timeout_ms: rng.draw(),
        })),
        16 => Body::Fenced { by: Generation(rng.draw()) },
        21 => Body::Resize { volume: rng.draw() as u16, len: rng.draw() },
        _ => Body::Bye { text: text(rng) },
    }
}

fn frame(rng: &mut Rng) -> Frame {
    Frame {
        generation: Generation(rng.draw()),
        seq: Seq(rng.draw()),
        epoch: Epoch(rng.draw()),
        body: body(rng),
    }
}

fn all_of(decoder: &mut Decoder) -> Result<Vec<Frame>, block::BlockError> {
    let mut out = Vec::new();
    while let Some(f) = decoder.next_frame()? {
        out.push(f);
    }
    Ok(out)
}

#[test]
fn every_frame_comes_back_whatever_the_pieces() {
    let mut rng = Rng::new(seed());
    for _ in 0..60 {
        let sent: Vec<Frame> = (0..40).map(|_| frame(&mut rng)).collect();
        let mut bytes = Vec::new();
        for f in &sent {
            let e = f.encode();
            assert_eq!(e.len() as u64, f.wire_len());
            bytes.extend_from_slice(&e.to_vec());
        }
        let (mut decoder, mut got, mut at) = (Decoder::new(), Vec::new(), 0);
        let biggest = *rng.choose(&[1usize, 7, 64, 1000, 100_000]);
        while at < bytes.len() {
            let n = (1 + rng.index(biggest)).min(bytes.len() - at);
            decoder.push(Bytes::copy_from_slice(&bytes[at..at + n]));
            got.extend(all_of(&mut decoder).unwrap());
            at += n;
        }
        assert!(decoder.is_empty());
        assert_eq!(got, sent);
    }
}

#[test]
fn one_wrong_bit_anywhere_is_found() {
    let mut rng = Rng::new(seed());
    for _ in 0..3000 {
        let f = frame(&mut rng);
        let mut bytes = f.encode().to_vec();
        let at = rng.index(bytes.len());
        bytes[at] ^= 1 << rng.below(8);
        let mut decoder = Decoder::new();
        decoder.push(Bytes::from(bytes));
        assert!(decoder.next_frame().is_err(), "bit of byte {at} of {f:?}");
        assert!(decoder.next_frame().is_err(), "and stays broken");
    }
}

/// A header whose checksum is right and whose fields are anything: what an enemy sends who knows the protocol.
#[test]
fn another_version_is_refused_and_both_are_named() {
    let mut bytes = frame(&mut Rng::new(1)).encode().to_vec();
    bytes[4] = 1;
    let mut decoder = Decoder::new();
    decoder.push(bytes.into());
    let e = decoder.next_frame().unwrap_err().to_string();
    assert!(e.contains("speaks version 1") && e.contains("this side version 4"), "{e}");
}

fn forged(rng: &mut Rng) -> Vec<u8> {
    let mut bytes = if rng.chance(0.7) { frame(rng).encode().to_vec() } else { vec![0; HEADER] };
    for _ in 0..1 + rng.below(4) {
        let at = rng.index(bytes.len());
        bytes[at] = *rng.choose(&[0, 1, 0x7f, 0x80, 0xff, rng.clone().draw() as u8]);
    }
    bytes[0..5].copy_from_slice(b"lbR1\x03");
    let len = (u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize).min(bytes.len() - HEADER);
    if rng.chance(0.8) {
        bytes[12..16].copy_from_slice(&(len as u32).to_le_bytes());
        let crc = crc_of(&Data::copy_from(&bytes[HEADER..HEADER + len]));
        bytes[16..20].copy_from_slice(&crc.to_le_bytes());
    }
    bytes[8..12].fill(0);
    let crc = crc_of(&Data::copy_from(&bytes[..HEADER]));
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn hostile_bytes_give_frames_or_errors_and_hold_no_memory() {
    let mut rng = Rng::new(seed());
    let (mut good, mut bad) = (0, 0);
    for _ in 0..30_000 {
        let bytes = match rng.below(3) {
            0 => (0..rng.below(300)).map(|_| rng.draw() as u8).collect(),
            _ => forged(&mut rng),
        };
        let mut decoder = Decoder::new();
        decoder.push(Bytes::from(bytes));
        match all_of(&mut decoder) {
            Ok(frames) => {
                good += 1;
                // whatever was understood can be written again and means the same
                for f in frames {
                    let mut again = Decoder::new();
                    again.push(Bytes::from(f.encode().to_vec()));
                    assert_eq!(again.next_frame().unwrap().unwrap(), f);
                }
                assert!(decoder.len() <= HEADER + MAX_PAYLOAD);
            }
            Err(e) => {
                bad += 1;
                assert!(e.to_string().starts_with("replication peer: "), "{e}");
            }
        }
    }
    assert!(good > 1000 && bad > 1000, "{good} {bad}");
}

#[test]
fn lengths_are_bounded_before_anything_is_waited_for() {
    let mut bytes = Frame { generation: Generation(1), seq: Seq(1), epoch: Epoch(1), body: Body::Flush }
        .encode()
        .to_vec();
    bytes[12..16].copy_from_slice(&(MAX_PAYLOAD as u32 + 1).to_le_bytes());
    bytes[8..12].fill(0);
    let crc = crc_of(&Data::copy_from(&bytes));
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    let mut decoder = Decoder::new();
    decoder.push(Bytes::from(bytes));
    let e = decoder.next_frame().unwrap_err();
    assert!(e.to_string().contains("longer than"), "{e}");
}

#[test]
fn unknown_types_are_skipped_only_if_they_allow_it() {
    for (flags, skipped) in [(0x8000u16, true), (0, false)] {
        let mut bytes = Frame { generation: Generation(1), seq: Seq(1), epoch: Epoch(1), body: Body::Flush }
            .encode()
            .to_vec();
        bytes[5] = 200;
        bytes[6..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].fill(0);
        let crc = crc_of(&Data::copy_from(&bytes));
        bytes[8..12].copy_from_slice(&crc.to_le_bytes());
        let mut decoder = Decoder::new();
        decoder.push(Bytes::from(bytes));
        let next = Frame { generation: Generation(2), seq: Seq(1), epoch: Epoch(1), body: Body::Commit };
        decoder.push(Bytes::from(next.encode().to_vec()));
        match decoder.next_frame() {
            Ok(got) => assert!(skipped && got == Some(next)),
            Err(e) => assert!(!skipped && e.to_string().contains("type 200"), "{e}"),
        }
    }
}
