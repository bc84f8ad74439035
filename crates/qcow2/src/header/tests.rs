//! What a header says is what was written, and nothing wrong gets through: each field by its name, any prefix, any byte.

use super::*;

fn sample() -> Header {
    Header {
        geometry: Geometry::new(3, 16, 4, false, false).unwrap(),
        size: 64 << 20,
        backing: Some("base.raw".into()),
        crypt: Crypt::None,
        l1_size: 1,
        l1_offset: HostOffset(0x30000),
        refcount_table_offset: HostOffset(0x10000),
        refcount_table_clusters: 1,
        snapshot_count: 0,
        snapshots_offset: HostOffset(0),
        incompatible: 0,
        compatible: COMPAT_LAZY_REFCOUNTS | 1 << 40,
        autoclear: 0,
        compression: Compression::Zlib,
        extensions: vec![
            Extension::BackingFormat("raw".into()),
            Extension::Unknown(0x1234_5678, vec![1, 2, 3]),
            feature_names(),
        ],
        later_fields: vec![],
        header_length: V3_LEN,
    }
}

fn edit(at: usize, bytes: &[u8]) -> Result<Header> {
    let mut b = sample().encode().unwrap();
    b[at..at + bytes.len()].copy_from_slice(bytes);
    Header::parse(&b)
}

#[test]
fn what_is_written_is_parsed_the_same() {
    let mut h = sample();
    assert_eq!(Header::parse(&h.encode().unwrap()).unwrap(), h);
    h.later_fields = vec![7; 16];
    h.header_length = V3_LEN + 16;
    h.set_backing(None, Some("raw"));
    h.set_bitmaps(Some(BitmapDirectory { count: 3, len: 100, at: HostOffset(0x70000) }));
    h.extensions.push(Extension::Crypto { at: HostOffset(5), len: 6 });
    let again = Header::parse(&h.encode().unwrap()).unwrap();
    assert_eq!(again, h);
    assert_eq!(again.backing_format(), None);
    assert_eq!(again.bitmaps().unwrap().unwrap().count, 3);
    let mut v2 = sample();
    v2.geometry = Geometry::new(2, 16, 4, false, false).unwrap();
    v2.header_length = V2_LEN;
    v2.compatible = 0;
    assert_eq!(Header::parse(&v2.encode().unwrap()).unwrap(), v2);
}

#[test]
fn each_field_is_checked_with_the_reference_text() {
    let u32b = |n: u32| n.to_be_bytes().to_vec();
    let u64b = |n: u64| n.to_be_bytes().to_vec();
    let cases: Vec<(usize, Vec<u8>, &str)> = vec![
        (0, u32b(5), "Image is not in qcow2 format"),
        (4, u32b(4), "Unsupported qcow2 version 4"),
        (20, u32b(8), "Unsupported cluster size: 2^8"),
        (20, u32b(63), "Unsupported cluster size: 2^63"),
        (8, u64b(70_000), "Invalid backing file offset"),
        (16, u32b(1024), "Backing file name too long"),
        (8, u64b(65_530), "Backing file name too long"),
        (24, u64b(1 << 63), "Image is too big"),
        (24, u64b(1 << 33), "L1 table is too small"),
        (32, u32b(3), "Unsupported encryption method 3"),
        (36, u32b((4 << 20) + 1), "Active L1 table too large"),
        (40, u64b(0x30008), "Active L1 table offset invalid"),
        (40, u64b(0xffff_ffff_ffff_0000), "Active L1 table offset invalid"),
        (48, u64b(0x10200), "Reference count table offset invalid"),
        (56, u32b(0), "Image does not contain a reference count table"),
        (56, u32b(129), "Reference count table too large"),
        (60, u32b(65_537), "Snapshot table too large"),
        (64, u64b(0x123), "Snapshot table offset invalid"),
        (72, u64b(32), "Unsupported qcow2 feature(s): Unknown incompatible feature: 20"),
        (72, u64b(8), "qcow2: Compression type incompatible feature bit must not be set"),
        (104, vec![1], "qcow2: Compression type incompatible feature bit must be set"),
        (104, vec![2], "qcow2: unknown compression type: 2"),
        (88, u64b(2), "data-file-raw requires a data file"),
        (96, u32b(7), "Reference count entry width too large; may not exceed 64 bits"),
        (100, u32b(103), "qcow2 header too short"),
        (100, u32b(65_544), "qcow2 header exceeds cluster size"),
        (116, u32b(0x7fff_ffff), "Header extension too large"),
        (116, u32b(16), "ERROR: ext_backing_format: len=16 too large (>=16)"),
    ];
    for (at, bytes, text) in cases {
        let e = edit(at, &bytes).expect_err(text);
        assert!(e.message().starts_with(text), "{text}: {e}");
    }
    assert!(edit(36, &u32b(4 << 20)).is_ok(), "an L1 table of 32 MiB is allowed");
    assert!(edit(56, &u32b(128)).is_ok(), "a refcount table of 8 MiB is allowed");
}

#[test]
fn unknown_features_are_named_from_the_image() {
    let mut h = sample();
    let mut table = vec![0; 48];
    table[1] = 5;
    table[2..8].copy_from_slice(b"sparks");
    h.extensions.push(Extension::FeatureNames(table));
    h.incompatible = 1 << 5 | 1 << 63;
    let e = Header::parse(&h.encode().unwrap()).unwrap_err();
    assert_eq!(
        e.message(),
        "Unsupported qcow2 feature(s): sparks, Unknown incompatible feature: 8000000000000000"
    );
}

#[test]
fn any_prefix_and_any_byte_is_survived() {
    let good = sample().encode().unwrap();
    for n in 0..good.len() {
        let _ = Header::parse(&good[..n]);
    }
    for at in 0..good.len() {
        for v in [0, 1, 0x7f, 0x80, 0xff] {
            let mut b = good.clone();
            b[at] = v;
            if let Ok(h) = Header::parse(&b) {
                // Accepted means it can be written and read again; a full cluster may not have room for that.
                if let Ok(out) = h.encode() {
                    assert!(Header::parse(&out).unwrap() == h, "byte {at} = {v}");
                }
            }
        }
    }
}

#[test]
fn patches_are_what_encode_writes() {
    let mut h = sample();
    h.l1_size = 77;
    h.l1_offset = HostOffset(0x90000);
    h.refcount_table_offset = HostOffset(0xa0000);
    h.refcount_table_clusters = 2;
    h.size = 1 << 30;
    h.incompatible = INCOMPAT_DIRTY;
    let all = h.encode().unwrap();
    let same = |(at, b): (u64, &[u8])| assert_eq!(&all[at as usize..at as usize + b.len()], b, "at {at}");
    same((h.patch_l1().0, &h.patch_l1().1));
    same((h.patch_refcount_table().0, &h.patch_refcount_table().1));
    same((h.patch_size().0, &h.patch_size().1));
    same((h.patch_snapshots().0, &h.patch_snapshots().1));
    same((h.patch_features().0, &h.patch_features().1));
}
