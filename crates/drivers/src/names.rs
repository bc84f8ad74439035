//! The names by which nodes can be opened again.
//!
//! An image's file name stands for the image with the chain that its headers say. If the graph says something else (a layer
//! was attached by hand, a header was rewritten) the name is `json:{…}` with the options that make it so. What must stay true:
//! whoever opens what such a name says reads what the node reads.

use crate::filters::description;
use block::Result;
use graph::{NodeCell, walk};
use std::path::Path;
use std::rc::Rc;

/// A backing file's name as seen from the working directory: relative names are relative to the image.
pub fn full_name(image: &str, backing: &str) -> String {
    let protocol = backing.split_once(':').is_some_and(|(p, _)| !p.contains('/'));
    let elsewhere = image.starts_with("json:") || image.contains("://");
    match Path::new(image).parent() {
        Some(dir) if !protocol && !elsewhere && !backing.starts_with('/') => {
            dir.join(backing).to_string_lossy().into_owned()
        }
        _ => backing.to_owned(),
    }
}

/// The name of `cell`.
///
/// # Errors
/// If a node does not say what it is.
pub async fn exact(cell: &Rc<NodeCell>) -> Result<String> {
    let mut names = exact_chain(cell).await?;
    Ok(names.swap_remove(0))
}

/// The names of `top` and of what is below it, as [`walk::chain`] has them.
///
/// # Errors
/// If a node does not say what it is.
pub async fn exact_chain(top: &Rc<NodeCell>) -> Result<Vec<String>> {
    let chain = walk::chain(top);
    let mut names: Vec<String> = Vec::with_capacity(chain.len());
    // from the bottom up: a name contains the one below it
    for (i, cell) in chain.iter().enumerate().rev() {
        let details = cell.node().details().await?;
        let below = names.last();
        let name = match below {
            Some(below) if cell.node().filtered().is_some() && below.starts_with("json:") => {
                if details.filename.starts_with("json:") { details.filename } else { below.clone() }
            }
            _ if cell.node().filtered().is_some() => details.filename,
            below => {
                let said = details.backing_filename.map(|b| full_name(&details.filename, &b));
                let is_so = said.as_ref() == below;
                if is_so || cell.node().primary().is_none() {
                    details.filename
                } else {
                    let under = match (below, chain.get(i + 1)) {
                        (Some(name), Some(node)) => match name.strip_prefix("json:") {
                            Some(json) => json.to_owned(),
                            None => description(node).await?,
                        },
                        _ => "null".to_owned(),
                    };
                    let own = description(cell).await?;
                    format!("json:{{\"backing\": {under}, {}", own.trim_start_matches('{'))
                }
            }
        };
        names.push(name);
    }
    names.reverse();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::full_name;

    #[test]
    fn backing_names_are_relative_to_the_image() {
        assert_eq!(full_name("a/b.qcow2", "c.raw"), "a/c.raw");
        assert_eq!(full_name("b.qcow2", "c.raw"), "c.raw");
        assert_eq!(full_name("/x/b.qcow2", "/c.raw"), "/c.raw");
        assert_eq!(full_name("/x/b.qcow2", "nbd://h/e"), "nbd://h/e");
    }
}
