//! What every filter with one child does the same way, and how filters are named in queries.

use block::{Data, Span};
use graph::{Edge, NodeCell, NodeDetails};
use std::rc::Rc;

/// The parts of [`graph::Node`] that are the same in every filter whose child is in the field `$child`: the length, the
/// only edge, demands passed down as they come, and block status left to the child.
macro_rules! filter_basics {
    ($child:ident) => {
        filter_basics!($child, [$child], $child);
    };
    // Of several children: whose length it has, all, and which one it shows.
    ($len:ident, [$($edge:ident),*], $child:ident) => {
        fn len(&self) -> u64 {
            self.$len.len()
        }
        fn edges(&self) -> Vec<std::rc::Rc<graph::Edge>> {
            vec![$(self.$edge.clone()),*]
        }
        fn set_writable(&self, _: bool) -> block::Io<'_> {
            Box::pin(async { Ok(()) })
        }
        fn filtered(&self) -> Option<std::rc::Rc<graph::Edge>> {
            Some(self.$child.clone())
        }
        fn as_any(&self) -> &dyn std::any::Any {
            self
        }
    };
}
pub(crate) use filter_basics;

/// Methods of [`graph::Node`] that a filter does not change: each that is named goes to the child in the field `$child` as
/// it comes. `extents` is left to whoever walks through the filter, `close` has nothing of the filter's own to write back, and
/// `details` are the child's under the name of a node that only its options describe.
macro_rules! filter_passes {
    (@limits $child:ident) => {
        fn limits(&self) -> block::Limits {
            self.$child.limits()
        }
    };
    (@wants $child:ident) => {
        fn wants(&self, _: &graph::Edge, above: graph::Demand, _: bool) -> graph::Demand {
            above
        }
    };
    (@read $child:ident) => {
        fn read(&self, at: block::Span) -> block::Io<'_, block::Data> {
            Box::pin(self.$child.read(at))
        }
    };
    (@write $child:ident) => {
        fn write(&self, at: block::Span, data: block::Data, flags: block::ReqFlags) -> block::Io<'_> {
            Box::pin(self.$child.write(at.start, data, flags))
        }
    };
    (@zero $child:ident) => {
        fn zero(&self, at: block::Span, flags: block::ReqFlags) -> block::Io<'_> {
            Box::pin(self.$child.zero(at, flags))
        }
    };
    (@discard $child:ident) => {
        fn discard(&self, at: block::Span) -> block::Io<'_> {
            Box::pin(self.$child.discard(at))
        }
    };
    (@extents $child:ident) => {
        fn extents(&self, at: block::Span) -> block::Io<'_, Vec<block::Extent>> {
            Box::pin(async move { Ok(vec![block::Extent::new(at, block::Kind::Unallocated)]) })
        }
    };
    (@flush $child:ident) => {
        fn flush(&self) -> block::Io<'_> {
            Box::pin(self.$child.flush())
        }
    };
    (@resize $child:ident) => {
        fn resize(&self, len: u64, prealloc: block::Prealloc) -> block::Io<'_> {
            Box::pin(self.$child.resize(len, prealloc))
        }
    };
    (@close $child:ident) => {
        fn close(&self) -> block::Io<'_> {
            Box::pin(async { Ok(()) })
        }
    };
    (@details $child:ident) => {
        fn details(&self) -> block::Io<'_, graph::NodeDetails> {
            Box::pin(async move {
                let driver = graph::Node::driver(self);
                $crate::filters::Given::default().details(driver, &self.$child).await
            })
        }
    };
    ($child:ident: $($what:ident),+) => {
        $(filter_passes!(@$what $child);)+
    };
}
pub(crate) use filter_passes;

/// The part of `at` that the disk behind `edge` has: a filter with an alignment of its own is asked for whole units, of which the
/// last may reach beyond the end.
pub(crate) fn inside(edge: &Edge, at: Span) -> Span {
    at.intersect(&Span::new(0, edge.len()))
}

/// Reads `at`, which may reach past the end of the disk behind `edge`: zeroes are there.
pub(crate) async fn read_past_end(edge: &Edge, at: Span) -> block::Result<Data> {
    let there = inside(edge, at);
    let mut data = edge.read(there).await?;
    data.append(Data::zeroes((at.len - there.len) as usize));
    Ok(data)
}

/// Options as the client gave them: flat keys (`inject-error.0.event`) with their value as JSON text. For file names of the
/// form `json:{…}` alone; what the options mean is in structs.
#[derive(Clone, Debug, Default)]
pub struct Given(pub Vec<(String, String)>);

impl Given {
    /// Whether an option other than `key` was given.
    pub fn any_but(&self, key: &str) -> bool {
        self.0.iter().any(|(k, _)| k != key)
    }

    /// Facts of a filter that shows its child's but for the name.
    pub(crate) async fn details(&self, driver: &str, child: &Rc<Edge>) -> block::Result<NodeDetails> {
        let below = child.child().node().details().await?;
        Ok(NodeDetails {
            filename: self.filename(driver, &[child]).await?,
            actual_size: below.actual_size,
            cluster_size: below.cluster_size,
            ..NodeDetails::default()
        })
    }

    /// The file name of a node that only its options describe.
    pub async fn filename(&self, driver: &str, children: &[&Rc<Edge>]) -> block::Result<String> {
        let mut members = vec![format!("\"driver\": \"{driver}\"")];
        for edge in children {
            members.push(format!("\"{}\": {}", edge.name(), description(&edge.child()).await?));
        }
        members.extend(self.0.iter().map(|(key, value)| format!("\"{key}\": {value}")));
        Ok(format!("json:{{{}}}", members.join(", ")))
    }
}

/// The options that would open this node, as JSON text; of drivers that have a short file name, what that stands for.
pub(crate) async fn description(cell: &Rc<NodeCell>) -> block::Result<String> {
    let mut around = Vec::new();
    let mut at = cell.clone();
    let innermost = loop {
        let driver = at.node().driver();
        let name = at.node().details().await?.filename;
        if let Some(json) = name.strip_prefix("json:") {
            break json.to_owned();
        }
        if let Some(driver) = name.strip_suffix("://").filter(|d| d.starts_with("null-")) {
            break format!("{{\"driver\": \"{driver}\"}}");
        }
        match at.node().primary() {
            None => break format!("{{\"driver\": \"{driver}\", \"filename\": {name:?}}}"),
            Some(edge) => {
                // what has its child's name is a job's, and nobody can open it
                if at.node().filtered().is_none() {
                    around.push((driver, edge.name().to_owned()));
                }
                at = edge.child();
            }
        }
    };
    let wrapped = around.iter().rev().fold(innermost, |inner, (driver, child)| {
        format!("{{\"driver\": \"{driver}\", \"{child}\": {inner}}}")
    });
    Ok(wrapped)
}
