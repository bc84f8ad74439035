//! Who may enter: one name, or a list of rules of which the first that fits decides.

use crate::error::QmpError;
use qapi::{Map, Value};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Pattern {
    Exact,
    /// `*` stands for any number of characters, `?` for one.
    Glob,
}

#[derive(Debug)]
struct Rule {
    pattern: Pattern,
    text: String,
    allow: bool,
}

/// The content of `authz-simple` and `authz-list`.
#[derive(Debug)]
pub(super) struct Rules {
    rules: Vec<Rule>,
    otherwise: bool,
}

fn allows(policy: Option<&Value>) -> bool {
    policy.and_then(Value::as_str) == Some("allow")
}

impl Rules {
    /// From properties that have passed the schema, or were set since.
    pub(super) fn read(p: &Map<String, Value>) -> Result<Rules, QmpError> {
        if let Some(identity) = p.get("identity") {
            let text = identity.as_str().unwrap_or_default().to_owned();
            let one = Rule { pattern: Pattern::Exact, text, allow: true };
            return Ok(Rules { rules: vec![one], otherwise: false });
        }
        let mut rules = Vec::new();
        for rule in p.get("rules").and_then(Value::as_array).into_iter().flatten() {
            let text = rule.get("match").and_then(Value::as_str);
            let text = text.ok_or_else(|| QmpError::generic("Parameter 'match' is missing"))?.to_owned();
            let glob = rule.get("format").and_then(Value::as_str) == Some("glob");
            let pattern = if glob { Pattern::Glob } else { Pattern::Exact };
            rules.push(Rule { pattern, text, allow: allows(rule.get("policy")) });
        }
        Ok(Rules { rules, otherwise: allows(p.get("policy")) })
    }

    /// Whether `name` may enter.
    pub(super) fn allow(&self, name: &str) -> bool {
        let fits = |r: &&Rule| match r.pattern {
            Pattern::Exact => r.text == name,
            Pattern::Glob => glob(r.text.as_bytes(), name.as_bytes()),
        };
        self.rules.iter().find(fits).map_or(self.otherwise, |r| r.allow)
    }
}

/// Whether `pattern` stands for `text`. In time of the product of their lengths at most: only the last star is
/// ever gone back to.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((sp, st)) => {
                    star = Some((sp, st + 1));
                    (p, t) = (sp + 1, st + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::json;

    fn rules(v: &Value) -> Rules {
        Rules::read(v.as_object().unwrap()).unwrap()
    }

    #[test]
    fn stars_and_question_marks() {
        for (pattern, text, fits) in [
            ("", "", true),
            ("*", "", true),
            ("a*c", "abbbc", true),
            ("a*c", "abbbd", false),
            ("*.x", "a.x.x", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*a*b*", "xxaxxbxx", true),
            ("*a*b", "xxaxxbx", false),
        ] {
            assert_eq!(glob(pattern.as_bytes(), text.as_bytes()), fits, "{pattern} {text}");
        }
        assert!(!glob("a*".repeat(200).as_bytes(), "a".repeat(199).as_bytes()));
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let r = rules(&json!({"policy": "allow", "rules": [
            {"match": "CN=good", "policy": "allow"},
            {"match": "CN=*", "policy": "deny", "format": "glob"}]}));
        assert!(r.allow("CN=good") && !r.allow("CN=bad") && r.allow("O=other"));
        let r = rules(&json!({"identity": "CN=me"}));
        assert!(r.allow("CN=me") && !r.allow("CN=*"));
        assert!(!rules(&json!({})).allow("anybody"));
    }
}
