//! Objects that users create by name.

use crate::error::{Class, QmpError, Reply};
use qapi::{Map, Value, json};
use std::cell::RefCell;

/// Objects at a time: far above any use, far below what would be felt.
const MAX_OBJECTS: usize = 4096;

struct Object {
    id: String,
    kind: String,
    properties: Map<String, Value>,
}

/// All objects, oldest first.
#[derive(Default)]
pub(crate) struct Objects(RefCell<Vec<Object>>);

/// Whether `id` may name an object, a job or an export.
pub(crate) fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

impl Objects {
    pub(crate) fn add(&self, kind: &str, id: &str, properties: Map<String, Value>) -> Result<(), QmpError> {
        if !is_identifier(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        for (name, value) in &properties {
            if value.as_i64().is_some_and(|n| n < 0) {
                let desc = format!("{name} value must be in range [0, {}]", i64::MAX);
                return Err(QmpError::generic(desc));
            }
        }
        if self.find(id).is_some() {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(QmpError::generic(desc));
        }
        if self.0.borrow().len() >= MAX_OBJECTS {
            return Err(QmpError::generic(format!("there are {MAX_OBJECTS} objects already")));
        }
        self.0.borrow_mut().push(Object { id: id.to_owned(), kind: kind.to_owned(), properties });
        Ok(())
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), QmpError> {
        let at = self.0.borrow().iter().position(|o| o.id == id);
        let at = at.ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))?;
        self.0.borrow_mut().remove(at);
        Ok(())
    }

    /// The kind of the object `id`.
    pub(crate) fn find(&self, id: &str) -> Option<String> {
        self.0.borrow().iter().find(|o| o.id == id).map(|o| o.kind.clone())
    }

    /// `qom-list`.
    pub(crate) fn list(&self, path: &str) -> Reply {
        let mut out = vec![json!({"name": "type", "type": "string"})];
        let child = |name: &str, of: &str| json!({"name": name, "type": format!("child<{of}>")});
        match path.trim_start_matches('/') {
            "" => out.push(child("objects", "container")),
            "objects" => out.extend(self.0.borrow().iter().map(|o| child(&o.id, &o.kind))),
            below => {
                let all = self.0.borrow();
                let id = below.strip_prefix("objects/").unwrap_or(below);
                let found = all.iter().find(|o| o.id == id).ok_or_else(|| {
                    QmpError::of(Class::DeviceNotFound, format!("Device '{path}' not found"))
                })?;
                out.extend(found.properties.keys().map(|k| json!({"name": k, "type": "int"})));
            }
        }
        Ok(Value::Array(out))
    }
}
