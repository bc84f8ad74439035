//! Objects that users create by name: what there is of them, their properties, and what they are good for.
//!
//! [`TYPES`] says which types there are and which properties each has; the schema has checked the properties of a new
//! object before they come here. What an object is good for is its [`Content`], made when the object is and made anew when a
//! property is set. Who uses an object holds its content, so removing it changes nothing for them, as in QSD.

mod authz;
mod secret;
mod throttle;
mod types;

use crate::error::{Class, QmpError, Reply};
use authz::Rules;
use drivers::filters::throttle::ThrottleGroup;
use env::Env;
use exports::{Authorize, ServerTls};
use qapi::{Map, Value, json};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tls::{Credentials, Endpoint, X509Options};
use types::Type;
pub use types::object_types;
pub(crate) use types::{list_properties, list_types};

/// Objects at a time: far above any use, far below what would be felt.
const MAX_OBJECTS: usize = 4096;

/// What an object is good for.
#[derive(Clone)]
enum Content {
    /// Its properties are all there is of it.
    Settings,
    Secret(Rc<[u8]>),
    Tls(Rc<Credentials>),
    Authz(Rc<Rules>),
    Throttle(Rc<ThrottleGroup>),
}

struct Object {
    id: String,
    kind: &'static Type,
    /// As the user gave them.
    properties: Map<String, Value>,
    /// The same, with file names that do not depend on the working directory.
    lasting: Map<String, Value>,
    content: Content,
}

/// `properties` with file names that do not depend on the working directory.
fn lasting(env: &Env, properties: &Map<String, Value>) -> Map<String, Value> {
    let mut out = properties.clone();
    for key in ["dir", "file"] {
        if let Some(Value::String(path)) = out.get_mut(key).filter(|v| v.as_str() != Some("")) {
            *path = env.absolute(Path::new(path.as_str())).to_string_lossy().into_owned();
        }
    }
    out
}

/// All objects, oldest first.
#[derive(Default)]
pub(crate) struct Objects(RefCell<Vec<Object>>);

/// Whether `id` may name an object, a job or an export.
pub(crate) fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}

fn text<'a>(properties: &'a Map<String, Value>, name: &str) -> Option<&'a str> {
    properties.get(name)?.as_str()
}

/// Whether each property has a value that it can have.
fn check(kind: &Type, properties: &Map<String, Value>) -> Result<(), QmpError> {
    if kind.name == "throttle-group" {
        return throttle::read(properties).map(|_| ());
    }
    match properties.iter().find(|(_, value)| value.as_i64().is_some_and(|n| n < 0)) {
        Some((name, _)) => Err(QmpError::generic(format!("{name} value must be in range [0, {}]", i64::MAX))),
        None => Ok(()),
    }
}

impl Objects {
    /// Creates an object; its properties have passed the schema.
    pub(crate) async fn add(
        &self,
        env: &Env,
        kind: &str,
        id: &str,
        properties: Map<String, Value>,
    ) -> Result<(), QmpError> {
        if !is_identifier(id) {
            return Err(QmpError::generic("Parameter 'id' expects an identifier"));
        }
        let kind =
            types::find(kind).ok_or_else(|| QmpError::generic(format!("invalid object type: {kind}")))?;
        // as in QSD, where properties are set before the object has its place
        check(kind, &properties)?;
        self.check_room(kind, id)?;
        let content = self.make(env, kind, &properties).await?;
        // Somebody may have been quicker while files were read.
        self.check_room(kind, id)?;
        let lasting = lasting(env, &properties);
        self.0.borrow_mut().push(Object { id: id.to_owned(), kind, properties, lasting, content });
        Ok(())
    }

    fn check_room(&self, kind: &Type, id: &str) -> Result<(), QmpError> {
        let all = self.0.borrow();
        if all.iter().any(|o| o.id == id) {
            let desc = format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(QmpError::generic(desc));
        }
        if kind.alone && all.iter().any(|o| o.kind.name == kind.name) {
            return Err(QmpError::generic(format!("only one {} instance allowed", kind.name)));
        }
        if all.len() >= MAX_OBJECTS {
            return Err(QmpError::generic(format!("there are {MAX_OBJECTS} objects already")));
        }
        Ok(())
    }

    /// What an object of this type with these properties, which were checked, is good for.
    async fn make(
        &self,
        env: &Env,
        kind: &'static Type,
        properties: &Map<String, Value>,
    ) -> Result<Content, QmpError> {
        if kind.name == "throttle-group" {
            return Ok(Content::Throttle(ThrottleGroup::new(env, throttle::read(properties)?)));
        }
        let number = |name: &str| match properties.get(name).and_then(Value::as_i64) {
            Some(n) => Some(n),
            None => types::property(kind, name).ok()?.default.value().as_i64(),
        };
        let most = number("thread-pool-max");
        let threads = 1..=i64::from(i32::MAX);
        if number("thread-pool-min") > most || most.is_some_and(|n| !threads.contains(&n)) {
            return Err(QmpError::generic("bad thread-pool-min/thread-pool-max values"));
        }
        match kind.name {
            "secret" => Ok(Content::Secret(secret::read(env, self, properties).await?)),
            "authz-simple" | "authz-list" => Ok(Content::Authz(Rc::new(Rules::read(properties)?))),
            "tls-creds-x509" => Ok(Content::Tls(self.credentials(env, properties).await?)),
            _ => Ok(Content::Settings),
        }
    }

    async fn credentials(&self, env: &Env, p: &Map<String, Value>) -> Result<Rc<Credentials>, QmpError> {
        if let Some(priority) = text(p, "priority").filter(|p| !matches!(*p, "" | "NORMAL" | "@SYSTEM")) {
            let desc = format!("Parameter 'priority' expects NORMAL or nothing, not '{priority}'");
            return Err(QmpError::generic(desc));
        }
        let dir = text(p, "dir").ok_or_else(|| QmpError::generic("Missing 'dir' property value"))?;
        let flag = |name: &str| p.get(name).and_then(Value::as_bool).unwrap_or(true);
        let password = match text(p, "passwordid") {
            Some(id) => Some(self.secret(id)?.to_vec()),
            None => None,
        };
        let options = X509Options {
            dir: PathBuf::from(dir),
            endpoint: if text(p, "endpoint") == Some("server") { Endpoint::Server } else { Endpoint::Client },
            verify_peer: flag("verify-peer"),
            sanity_check: flag("sanity-check"),
            password,
        };
        Ok(Rc::new(Credentials::load(env, &options).await?))
    }

    pub(crate) fn remove(&self, id: &str) -> Result<(), QmpError> {
        let at = self.0.borrow().iter().position(|o| o.id == id);
        let at = at.ok_or_else(|| QmpError::generic(format!("object '{id}' not found")))?;
        let in_use = match &self.0.borrow()[at] {
            Object { content: Content::Throttle(group), .. } => group.members() > 0,
            // the process's own
            Object { kind, .. } => kind.alone,
        };
        if in_use {
            return Err(QmpError::generic(format!("object '{id}' is in use, can not be deleted")));
        }
        self.0.borrow_mut().remove(at);
        Ok(())
    }

    /// All objects, oldest first, as they can be made again: id, type and properties.
    pub(crate) fn described(&self) -> Vec<(String, &'static str, Map<String, Value>)> {
        let all = self.0.borrow();
        let one = |o: &Object| {
            let properties = match &o.content {
                Content::Throttle(group) => {
                    let limits = throttle::show(&group.config(), "limits");
                    [("limits".to_owned(), limits)].into_iter().collect()
                }
                _ => o.lasting.clone(),
            };
            (o.id.clone(), o.kind.name, properties)
        };
        all.iter().map(one).collect()
    }

    /// The kind of the object `id`.
    pub(crate) fn find(&self, id: &str) -> Option<&'static str> {
        self.0.borrow().iter().find(|o| o.id == id).map(|o| o.kind.name)
    }

    fn content(&self, id: &str) -> Option<Content> {
        self.0.borrow().iter().find(|o| o.id == id).map(|o| o.content.clone())
    }

    /// The bytes of a secret.
    pub(crate) fn secret(&self, id: &str) -> Result<Rc<[u8]>, QmpError> {
        match self.content(id) {
            Some(Content::Secret(bytes)) => Ok(bytes),
            Some(_) => Err(QmpError::generic(format!("Object with id '{id}' is not a secret"))),
            None => Err(QmpError::generic(format!("No secret with id '{id}'"))),
        }
    }

    /// The throttle group `id`.
    pub(crate) fn throttle_group(&self, id: &str) -> Option<Rc<ThrottleGroup>> {
        match self.content(id) {
            Some(Content::Throttle(group)) => Some(group),
            _ => None,
        }
    }

    /// TLS credentials for one end of connections.
    pub(crate) fn tls(&self, id: &str, endpoint: Endpoint) -> Result<Rc<Credentials>, QmpError> {
        match self.content(id) {
            Some(Content::Tls(c)) if c.endpoint() == endpoint => Ok(c),
            Some(Content::Tls(_)) => {
                let end = if endpoint == Endpoint::Server { "server" } else { "client" };
                Err(QmpError::generic(format!("Expected TLS credentials for a {end} endpoint")))
            }
            Some(_) => Err(QmpError::generic(format!("Object with id '{id}' is not TLS credentials"))),
            None => Err(QmpError::generic(format!("No TLS credentials with id '{id}'"))),
        }
    }

    /// What `nbd-server-start` says of TLS. The list of who may enter is looked up for each client: it may be made
    /// after the server, and changed; while there is none by that name nobody enters.
    pub(crate) fn server_tls(
        self: &Rc<Self>,
        creds: Option<&str>,
        authz: Option<String>,
    ) -> Result<Option<ServerTls>, QmpError> {
        let Some(creds) = creds else { return Ok(None) };
        let credentials = self.tls(creds, Endpoint::Server)?;
        let objects = self.clone();
        let authorize = authz.map(|id| -> Authorize {
            Rc::new(move |name| match objects.content(&id) {
                Some(Content::Authz(rules)) => rules.allow(name),
                _ => false,
            })
        });
        Ok(Some(ServerTls { credentials, authorize }))
    }

    /// What is at a path such as `/objects/ID`, of which a part at the end is enough.
    fn place(&self, path: &str) -> Result<Place, QmpError> {
        let parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
        let has = |id: &str| self.0.borrow().iter().any(|o| o.id == id);
        match (path.starts_with('/'), parts.as_slice()) {
            (true, []) => Ok(Place::Root),
            (_, ["objects"]) => Ok(Place::Objects),
            (_, ["objects", id]) | (false, [id]) if has(id) => Ok(Place::Object((*id).to_owned())),
            _ => Err(QmpError::of(Class::DeviceNotFound, format!("Device '{path}' not found"))),
        }
    }

    /// Runs `read` on the object `id`, which is there.
    fn at<T>(&self, id: &str, read: impl FnOnce(&mut Object) -> T) -> Result<T, QmpError> {
        let mut all = self.0.borrow_mut();
        let found = all.iter_mut().find(|o| o.id == id);
        found.map(read).ok_or_else(|| QmpError::of(Class::DeviceNotFound, format!("Device '{id}' not found")))
    }

    /// `qom-list`.
    pub(crate) fn list(&self, path: &str) -> Reply {
        let child = |name: &str, of: &str| json!({"name": name, "type": format!("child<{of}>")});
        let mut out = vec![json!({"name": "type", "type": "string"})];
        if path.is_empty() {
            return Err(QmpError::generic("Path '' is ambiguous"));
        }
        match self.place(path)? {
            Place::Root => out.push(child("objects", "container")),
            Place::Objects => out.extend(self.0.borrow().iter().map(|o| child(&o.id, o.kind.name))),
            Place::Object(id) => return self.at(&id, |o| Value::Array(types::list(o.kind))),
        }
        Ok(Value::Array(out))
    }

    /// A property of one of the containers: its type, or the path of what is in it.
    fn of_container(&self, place: &Place, property: &str) -> Reply {
        match (place, property) {
            (_, "type") => Ok(json!("container")),
            (Place::Root, "objects") => Ok(json!("/objects")),
            (Place::Objects, id) if self.find(id).is_some() => Ok(json!(format!("/objects/{id}"))),
            _ => Err(QmpError::generic(format!("Property 'container.{property}' not found"))),
        }
    }

    /// `qom-get`: as the user gave it, or its default.
    pub(crate) fn get(&self, path: &str, property: &str) -> Reply {
        let id = match self.place(path)? {
            Place::Object(id) => id,
            container => return self.of_container(&container, property),
        };
        self.at(&id, |o| {
            if property == "type" {
                return Ok(json!(o.kind.name));
            }
            let declared = types::property(o.kind, property)?;
            if let Content::Throttle(group) = &o.content {
                return Ok(throttle::show(&group.config(), property));
            }
            Ok(o.properties.get(property).cloned().unwrap_or_else(|| declared.default.value()))
        })?
    }

    /// `qom-set`: the object is made anew with the property changed; if that fails it stays as it was.
    pub(crate) async fn set(&self, env: &Env, path: &str, property: &str, value: Value) -> Reply {
        let fixed = |of: &str| QmpError::generic(format!("Property '{of}.{property}' is not writable"));
        let id = match self.place(path)? {
            Place::Object(id) => id,
            container => return self.of_container(&container, property).and(Err(fixed("container"))),
        };
        let (kind, mut properties) = self.at(&id, |o| (o.kind, o.properties.clone()))?;
        if property == "type" {
            return Err(fixed(kind.name));
        }
        types::property(kind, property)?.check(property, &value)?;
        if let Content::Throttle(group) = self.at(&id, |o| o.content.clone())? {
            group.configure(throttle::changed(group.config(), property, &value)?);
            return Ok(json!({}));
        }
        properties.insert(property.to_owned(), value);
        check(kind, &properties)?;
        let content = self.make(env, kind, &properties).await?;
        let lasting = lasting(env, &properties);
        self.at(&id, |o| (o.properties, o.lasting, o.content) = (properties, lasting, content))?;
        Ok(json!({}))
    }
}

/// What a path of the object model leads to.
enum Place {
    Root,
    Objects,
    Object(String),
}
