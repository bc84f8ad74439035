//! The schema: which commands exist, what types their arguments have, and the introspection answer.
//!
//! Three sources make it: the reference's own introspection answer (`schema/qmp-schema.json`), our additions to it
//! (`schema/overlay.json`), and the list of commands and events that the daemon implements. What is not implemented
//! (commands, events, drivers, kinds of exports and objects) is cut out, so that a client that asks is told the truth.

use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

const BASE: &str = include_str!("../schema/qmp-schema.json");
const OVERLAY: &str = include_str!("../schema/overlay.json");

/// A type, as far as checking input needs it.
#[derive(Clone, Debug)]
pub(crate) enum Type {
    /// A JSON scalar, by its `json-type`.
    Builtin(String),
    Enum(Vec<String>),
    Array(String),
    Object(Object),
    /// Types one of which the value has; and the name for messages.
    Alternate(Vec<String>, &'static str),
}

#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) members: Vec<Member>,
    pub(crate) tag: Option<String>,
    pub(crate) variants: BTreeMap<String, String>,
}

#[derive(Clone, Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    pub(crate) of: String,
    pub(crate) optional: bool,
}

/// The schema of this daemon.
pub struct Schema {
    pub(crate) types: BTreeMap<String, Type>,
    /// Command or command-line option to its argument type.
    arguments: BTreeMap<String, String>,
    answer: Value,
}

impl Schema {
    /// The schema cut down to `commands` and `events`.
    ///
    /// # Panics
    /// If the files under `schema/` are damaged or a name is not in them: defects of the program, found by its tests.
    pub fn new(commands: &[&str], events: &[&str]) -> Schema {
        let mut entities: Vec<Value> = parse(BASE);
        let overlay: Overlay = Overlay::read();
        overlay.apply(&mut entities);
        let wanted: BTreeSet<&str> = commands.iter().chain(events).copied().collect();
        let known: BTreeSet<&str> =
            entities.iter().filter(|e| is_entry(e)).map(|e| text(e, "name")).collect();
        for name in &wanted {
            assert!(known.contains(name), "{name} is not in the schema");
        }
        let types =
            entities.iter().filter(|e| !is_entry(e)).map(|e| (text(e, "name").to_owned(), type_of(e)));
        let types: BTreeMap<String, Type> = types.collect();
        let mut arguments: BTreeMap<String, String> = entities
            .iter()
            .filter(|e| text(e, "meta-type") == "command" && wanted.contains(text(e, "name")))
            .map(|e| (text(e, "name").to_owned(), text(e, "arg-type").to_owned()))
            .collect();
        let options = overlay.0["options"].as_object().into_iter().flatten();
        arguments.extend(options.map(|(k, v)| (k.clone(), v.as_str().unwrap_or_default().to_owned())));
        let answer = prune(&entities, &wanted);
        Schema { types, arguments, answer }
    }

    /// What `query-qmp-schema` returns.
    pub fn answer(&self) -> &Value {
        &self.answer
    }

    pub(crate) fn argument_type(&self, entry: &str) -> Option<&str> {
        self.arguments.get(entry).map(String::as_str)
    }
}

fn parse(text: &str) -> Vec<Value> {
    match serde_json::from_str(text) {
        Ok(Value::Array(list)) => list,
        other => panic!("schema/qmp-schema.json is damaged: {other:?}"),
    }
}

fn text<'a>(entity: &'a Value, key: &str) -> &'a str {
    entity[key].as_str().unwrap_or_default()
}

fn is_entry(entity: &Value) -> bool {
    matches!(text(entity, "meta-type"), "command" | "event")
}

fn strings(list: &Value) -> Vec<String> {
    list.as_array().into_iter().flatten().filter_map(|v| v.as_str()).map(str::to_owned).collect()
}

/// Our additions; the file says what each is.
struct Overlay(Value);

impl Overlay {
    fn read() -> Overlay {
        match serde_json::from_str(OVERLAY) {
            Ok(v) => Overlay(v),
            Err(e) => panic!("schema/overlay.json is damaged: {e}"),
        }
    }

    fn apply(&self, entities: &mut Vec<Value>) {
        let section = |name: &str| self.0[name].as_object().into_iter().flatten();
        for (id, members) in section("members") {
            let list = find(entities, id)["members"].as_array_mut();
            list.into_iter().for_each(|l| l.extend(members.as_array().into_iter().flatten().cloned()));
        }
        for (id, values) in section("values") {
            let e = find(entities, id);
            for v in strings(values) {
                e["members"].as_array_mut().into_iter().for_each(|l| l.push(json!({"name": v})));
                e["values"].as_array_mut().into_iter().for_each(|l| l.push(json!(v)));
            }
        }
        for (id, variants) in section("variants") {
            let list = find(entities, id)["variants"].as_array_mut();
            list.into_iter().for_each(|l| l.extend(variants.as_array().into_iter().flatten().cloned()));
        }
        for (id, keep) in section("keep") {
            let keep = strings(keep);
            let kept = |v: &Value| v.as_str().is_some_and(|s| keep.iter().any(|k| k == s));
            let cut = |list: &mut Value, key: &str| {
                let list = list.as_array_mut();
                list.into_iter().for_each(|l| l.retain(|v| kept(if key.is_empty() { v } else { &v[key] })));
            };
            let e = find(entities, id);
            cut(&mut e["members"], "name");
            cut(&mut e["values"], "");
            // a union over the enumeration loses the same branches
            for e in entities.iter_mut() {
                let tag = e["tag"].as_str().unwrap_or_default();
                let over = e["members"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|m| m["name"] == tag && m["type"] == **id);
                if over {
                    cut(&mut e["variants"], "case");
                }
            }
        }
        entities.extend(self.0["types"].as_array().into_iter().flatten().cloned());
        entities.extend(self.0["commands"].as_array().into_iter().flatten().cloned());
    }
}

fn find<'a>(entities: &'a mut [Value], id: &str) -> &'a mut Value {
    match entities.iter_mut().find(|e| text(e, "name") == id) {
        Some(e) => e,
        None => panic!("schema/overlay.json names {id}, which is not in schema/qmp-schema.json"),
    }
}

fn type_of(e: &Value) -> Type {
    match text(e, "meta-type") {
        "enum" => Type::Enum(strings(&e["values"])),
        "array" => Type::Array(text(e, "element-type").to_owned()),
        "alternate" => {
            let of: Vec<String> =
                e["members"].as_array().into_iter().flatten().map(|m| text(m, "type").to_owned()).collect();
            let name = alternate_name(text(e, "name"));
            Type::Alternate(of, name)
        }
        "object" => Type::Object(Object {
            members: e["members"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|m| Member {
                    name: text(m, "name").to_owned(),
                    of: text(m, "type").to_owned(),
                    optional: m.get("default").is_some(),
                })
                .collect(),
            tag: e["tag"].as_str().map(str::to_owned),
            variants: e["variants"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|v| (text(v, "case").to_owned(), text(v, "type").to_owned()))
                .collect(),
        }),
        _ => Type::Builtin(text(e, "json-type").to_owned()),
    }
}

/// The introspection answer masks the names of types, but messages about alternates show them.
fn alternate_name(masked: &str) -> &'static str {
    match masked {
        "109" => "BlockDirtyBitmapOrStr",
        "153" => "StrOrNull",
        "228" => "BlockdevRef",
        "238" => "BlockdevRefOrNull",
        "239" => "Qcow2OverlapChecks",
        _ => "value",
    }
}

/// The entities that the wanted entries reach, in their old order.
fn prune(entities: &[Value], wanted: &BTreeSet<&str>) -> Value {
    let by_name: BTreeMap<&str, &Value> = entities.iter().map(|e| (text(e, "name"), e)).collect();
    let mut reached: BTreeSet<&str> = BTreeSet::new();
    let mut todo: Vec<&str> = wanted.iter().copied().collect();
    while let Some(name) = todo.pop() {
        if !reached.insert(name) {
            continue;
        }
        let Some(e) = by_name.get(name) else { continue };
        todo.extend(["arg-type", "ret-type", "element-type"].iter().filter_map(|k| e[*k].as_str()));
        for list in ["members", "variants"] {
            todo.extend(e[list].as_array().into_iter().flatten().filter_map(|m| m["type"].as_str()));
        }
    }
    let is_reached = |e: &&Value| {
        let name = text(e, "name");
        reached.contains(name) && (!is_entry(e) || wanted.contains(name))
    };
    entities.iter().filter(is_reached).cloned().collect()
}
