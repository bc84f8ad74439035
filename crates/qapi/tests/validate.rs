//! Arguments against the schema, with the words of QSD 10.0.2 (error-catalogue, and probes of its command line).

use qapi::{Map, Schema, Value, json, keyval};

const COMMANDS: &[&str] = &[
    "blockdev-add",
    "blockdev-reopen",
    "blockdev-create",
    "blockdev-mirror",
    "block-job-set-speed",
    "block-job-change",
    "block-export-add",
    "block-dirty-bitmap-merge",
    "job-pause",
    "nbd-server-start",
    "object-add",
    "qmp_capabilities",
    "query-jobs",
    "query-named-block-nodes",
    "transaction",
];

fn schema() -> Schema {
    Schema::new(COMMANDS, &["JOB_STATUS_CHANGE"])
}

fn object(v: Value) -> Map<String, Value> {
    match v {
        Value::Object(m) => m,
        other => panic!("{other} is no object"),
    }
}

#[test]
fn json_arguments() {
    let s = schema();
    let mirror = |extra: Value| {
        let mut m = object(json!({"device": "a", "target": "b", "sync": "full"}));
        m.extend(object(extra));
        Value::Object(m)
    };
    for (command, arguments, want) in [
        ("query-jobs", json!({"x": 1}), "Parameter 'x' is unexpected"),
        ("job-pause", json!({"id": 3}), "Invalid parameter type for 'id', expected: string"),
        ("job-pause", json!({}), "Parameter 'id' is missing"),
        ("job-pause", json!({"id": "a", "idd": "b"}), "Parameter 'idd' is unexpected"),
        ("qmp_capabilities", json!({"enable": ["bogus"]}), "Parameter 'null' does not accept value 'bogus'"),
        (
            "qmp_capabilities",
            json!({"enable": [5]}),
            "Invalid parameter type for 'enable[0]', expected: string",
        ),
        ("qmp_capabilities", json!({"enable": {}}), "Invalid parameter type for 'enable', expected: array"),
        (
            "block-job-set-speed",
            json!({"device": "x", "speed": 1.5}),
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            "block-job-set-speed",
            json!({"device": "x", "speed": "5"}),
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            "block-job-set-speed",
            json!({"device": "x", "speed": 1_u64 << 63}),
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            "blockdev-mirror",
            mirror(json!({"sync": "weird"})),
            "Parameter 'sync' does not accept value 'weird'",
        ),
        ("blockdev-mirror", mirror(json!({"bitmaps": "b"})), "Parameter 'bitmaps' is unexpected"),
        (
            "blockdev-mirror",
            mirror(json!({"granularity": 1_u64 << 32})),
            "Parameter 'granularity' expects uint32_t",
        ),
        ("blockdev-mirror", mirror(json!({"granularity": -1})), "Parameter 'granularity' expects uint32_t"),
        (
            "query-named-block-nodes",
            json!({"flat": "yes"}),
            "Invalid parameter type for 'flat', expected: boolean",
        ),
        ("blockdev-mirror", mirror(json!({"granularity": "1"})), "Parameter 'granularity' expects uint64"),
        (
            "blockdev-create",
            json!({"job-id": "a", "options": {"driver": "file", "filename": "x", "size": "1"}}),
            "Parameter 'options.size' expects uint64",
        ),
        (
            "blockdev-add",
            json!({"driver": "blkdebug", "image": "x", "max-transfer": i64::MIN}),
            "Parameter 'max-transfer' expects int32_t",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [5]}),
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        ),
        ("blockdev-create", json!({"options": {}}), "Parameter 'job-id' is missing"),
        (
            "blockdev-create",
            json!({"job-id": "a", "options": {"driver": "raw", "size": 1}}),
            "Parameter 'options.size' is unexpected",
        ),
        (
            "blockdev-create",
            json!({"job-id": "a", "options": {"driver": "file", "filename": "x"}}),
            "Parameter 'options.size' is missing",
        ),
        ("blockdev-add", json!({"node-name": "x"}), "Parameter 'driver' is missing"),
        (
            "blockdev-add",
            json!({"driver": "nodriver"}),
            "Parameter 'driver' does not accept value 'nodriver'",
        ),
        (
            "blockdev-add",
            json!({"driver": "file", "filename": "x", "bogus": 1}),
            "Parameter 'bogus' is unexpected",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "file": 5}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "file": "f", "backing": []}),
            "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "file": {"driver": "file"}}),
            "Parameter 'file.filename' is missing",
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2", "node-name": "a"}]}),
            "Parameter 'options[0].file' is missing",
        ),
        ("nbd-server-start", json!({"addr": {"type": "unix"}}), "Parameter 'addr.data' is missing"),
        ("block-job-change", json!({"id": "x", "type": "mirror"}), "Parameter 'copy-mode' is missing"),
        (
            "transaction",
            json!({"actions": [{"type": "nope", "data": {}}]}),
            "Parameter 'type' does not accept value 'nope'",
        ),
        ("transaction", json!({"actions": [{"type": "abort"}]}), "Parameter 'actions[0].data' is missing"),
        (
            "transaction",
            json!({"actions": [{"type": "abort", "data": {"x": 1}}]}),
            "Parameter 'actions[0].data.x' is unexpected",
        ),
        (
            "object-add",
            json!({"qom-type": "nope", "id": "x"}),
            "Parameter 'qom-type' does not accept value 'nope'",
        ),
        (
            "block-export-add",
            json!({"type": "nope", "id": "e", "node-name": "a"}),
            "Parameter 'type' does not accept value 'nope'",
        ),
    ] {
        assert_eq!(
            s.check_json(command, object(arguments.clone())),
            Err(want.to_owned()),
            "{command} {arguments}"
        );
    }
}

#[test]
fn good_json_comes_back_unchanged() {
    let s = schema();
    for (command, arguments) in [
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "q", "file": "f", "backing": null})),
        (
            "blockdev-add",
            json!({"driver": "nbd", "node-name": "n", "server": {"type": "inet", "host": "h", "port": "1"}}),
        ),
        (
            "blockdev-mirror",
            json!({"device": "a", "target": "b", "sync": "full", "copy-mode": "read-write-blocking"}),
        ),
        (
            "blockdev-mirror",
            json!({"device": "a", "target": "b", "sync": "top", "convergence": "throttle-guest", "converge-after": 5}),
        ),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "a", "bitmaps": ["b", {"node": "n", "name": "c"}]}),
        ),
        ("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": "x"}}, "max-connections": 0})),
    ] {
        let out = s.check_json(command, object(arguments.clone())).unwrap();
        assert_eq!(Value::Object(out), arguments);
    }
}

#[test]
fn command_line_values() {
    let s = schema();
    let run = |option: &str, text: &str| {
        let implied = if option == "--export" { "type" } else { "driver" };
        s.check_keyval(option, keyval::parse(text, Some(implied))?.values)
    };
    for (option, text, want) in [
        ("--blockdev", "file", "Parameter 'filename' is missing"),
        ("--blockdev", "", "Parameter 'driver' is missing"),
        ("--blockdev", "file,filename=x,read-only=1", "Parameter 'read-only' expects 'on' or 'off'"),
        (
            "--blockdev",
            "file,filename=x,cache.direct=maybe",
            "Parameter 'cache.direct' expects 'on' or 'off'",
        ),
        ("--blockdev", "file,filename=x,cache=5", "Invalid parameter type for 'cache', expected: object"),
        ("--blockdev", "file,filename=x,cache.foo=on", "Parameter 'cache.foo' is unexpected"),
        ("--blockdev", "raw,file=f,size=5M", "Parameter 'size' expects integer"),
        ("--blockdev", "raw,file=f,size=99999999999999999999", "Parameter 'size' expects integer"),
        ("--blockdev", "raw,file.driver=file", "Parameter 'file.filename' is missing"),
        ("--blockdev", "raw,file.0=xx", "Invalid parameter type for 'file', expected: BlockdevRef"),
        ("--blockdev", "raw,file.driver=fil", "Parameter 'driver' does not accept value 'fil'"),
        ("--export", "nbd", "Parameter 'id' is missing"),
        ("--export", "nbd,id=e", "Parameter 'node-name' is missing"),
        ("--export", "nbd,id=e,node-name=x,bitmap=b", "Parameter 'bitmap' is unexpected"),
        ("--nbd-server", "addr.type=unix", "Parameter 'addr.path' is missing"),
        ("--nbd-server", "addr.type=unix,addr.data.path=x", "Parameter 'addr.path' is missing"),
        (
            "--nbd-server",
            "addr.type=unix,addr.path=x,max-connections=99999999999",
            "Parameter 'max-connections' expects uint32_t",
        ),
        (
            "--nbd-server",
            "addr.type=unix,addr.path=x,handshake-max-seconds=-1",
            "Parameter 'handshake-max-seconds' expects uint32_t",
        ),
        ("--monitor", "chardev=c,pretty=x", "Parameter 'pretty' expects 'on' or 'off'"),
    ] {
        assert_eq!(run(option, text), Err(want.to_owned()), "{option} {text}");
    }
    let out = run(
        "--blockdev",
        "raw,node-name=r,size=0x1000,offset=010,read-only=yes,file.driver=file,file.filename=a",
    );
    let want = json!({"driver": "raw", "node-name": "r", "read-only": true, "offset": 8, "size": 4096,
        "file": {"driver": "file", "filename": "a"}});
    assert_eq!(Value::Object(out.unwrap()), want);
    let out = run("--export", "nbd,id=e,node-name=x,bitmaps.0=b,writable=on").unwrap();
    assert_eq!(out["bitmaps"], json!(["b"]));
}

#[test]
fn introspection_tells_what_is_there() {
    let s = schema();
    let list = s.answer().as_array().unwrap();
    let named = |meta: &str| -> Vec<&str> {
        let of = list.iter().filter(|e| e["meta-type"] == meta);
        let mut names: Vec<&str> = of.map(|e| e["name"].as_str().unwrap()).collect();
        names.sort_unstable();
        names
    };
    let mut commands = COMMANDS.to_vec();
    commands.sort_unstable();
    assert_eq!(named("command"), commands);
    assert_eq!(named("event"), ["JOB_STATUS_CHANGE"]);
    // every type that is referred to is there, and nothing else
    let text = s.answer().to_string();
    for e in list {
        for key in ["arg-type", "ret-type", "element-type"] {
            if let Some(t) = e[key].as_str() {
                assert!(list.iter().any(|e| e["name"] == t), "{t}");
            }
        }
    }
    assert!(text.contains("read-write-blocking"));
    assert!(text.contains("\"case\":\"qcow2\""));
    assert!(!text.contains("\"case\":\"vvfat\""));
    assert!(text.contains("vhost-user-blk") && !text.contains("vduse-blk"));
}
