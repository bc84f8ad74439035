//! Changes of records, and the difference between two states of them. Pure.

use std::collections::{BTreeMap, BTreeSet};

/// Records by table and key.
pub type Tables = BTreeMap<String, BTreeMap<String, Vec<u8>>>;

/// Changes of records by table and key; `None` deletes.
pub type Changes = BTreeMap<(String, String), Option<Vec<u8>>>;

/// Changes that become durable together or not at all.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    cleared: BTreeSet<String>,
    changes: Changes,
}

impl Batch {
    /// No changes.
    pub fn new() -> Batch {
        Batch::default()
    }

    /// Gives the record `key` of `table` this value.
    pub fn put(&mut self, table: &str, key: &str, value: Vec<u8>) {
        self.changes.insert((table.to_owned(), key.to_owned()), Some(value));
    }

    /// Deletes the record `key` of `table`, if there is one.
    pub fn delete(&mut self, table: &str, key: &str) {
        self.changes.insert((table.to_owned(), key.to_owned()), None);
    }

    /// Deletes all records of `table` that the batch does not put.
    pub fn clear(&mut self, table: &str) {
        self.cleared.insert(table.to_owned());
    }

    /// Whether nothing would change.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.cleared.is_empty()
    }

    /// Tables that are emptied before the changes are made.
    pub fn cleared(&self) -> &BTreeSet<String> {
        &self.cleared
    }

    /// The changes, the last of each record.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// What makes `to` of `from`, in the tables named in `tables`.
    pub fn between(from: &Tables, to: &Tables, tables: &[&str]) -> Batch {
        let mut batch = Batch::new();
        let none = BTreeMap::new();
        for table in tables {
            let (old, new) = (from.get(*table).unwrap_or(&none), to.get(*table).unwrap_or(&none));
            for key in old.keys().filter(|k| !new.contains_key(*k)) {
                batch.delete(table, key);
            }
            for (key, value) in new.iter().filter(|(k, v)| old.get(*k) != Some(v)) {
                batch.put(table, key, value.clone());
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_what_it_takes() {
        let tables = |rows: &[(&str, &str, &str)]| {
            let mut t = Tables::new();
            for (table, key, value) in rows {
                t.entry((*table).to_owned())
                    .or_default()
                    .insert((*key).to_owned(), value.as_bytes().to_vec());
            }
            t
        };
        let from = tables(&[("a", "same", "1"), ("a", "gone", "1"), ("a", "other", "1"), ("b", "left", "1")]);
        let to = tables(&[("a", "same", "1"), ("a", "other", "2"), ("a", "new", "1")]);
        let batch = Batch::between(&from, &to, &["a"]);
        let got: Vec<_> =
            batch.changes().iter().map(|((t, k), v)| (t.as_str(), k.as_str(), v.clone())).collect();
        assert_eq!(
            got,
            [("a", "gone", None), ("a", "new", Some(b"1".to_vec())), ("a", "other", Some(b"2".to_vec()))]
        );
    }
}
