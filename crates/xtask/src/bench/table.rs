//! Figures of a case, and the tables they are printed in.

use super::Side;
use std::cell::{Ref, RefCell};
use std::collections::BTreeMap;

/// Values of one metric, by side, over the rounds.
#[derive(Default)]
pub(super) struct Figures(BTreeMap<Side, Vec<f64>>);

impl Figures {
    pub(super) fn add(&mut self, side: Side, value: f64) {
        self.0.entry(side).or_default().push(value);
    }

    fn sorted(&self, side: Side) -> Vec<f64> {
        let mut v = self.0.get(&side).cloned().unwrap_or_default();
        v.sort_by(f64::total_cmp);
        v
    }

    fn median(&self, side: Side) -> Option<f64> {
        let v = self.sorted(side);
        v.get(v.len() / 2).copied()
    }

    /// Lowest, median, highest.
    fn spread(&self, side: Side) -> Option<[f64; 3]> {
        let v = self.sorted(side);
        Some([*v.first()?, self.median(side)?, *v.last()?])
    }

    /// `12.3k [11.0k-14.1k]`.
    fn shown(&self, side: Side) -> String {
        match self.spread(side).map(|all| all.map(short)) {
            Some([low, middle, high]) => format!("{middle} [{low}-{high}]"),
            None => "-".to_owned(),
        }
    }
}

fn short(v: f64) -> String {
    if v >= 1e6 {
        format!("{:.2}M", v / 1e6)
    } else if v >= 1e4 {
        format!("{:.1}k", v / 1e3)
    } else if v >= 100.0 {
        format!("{v:.0}")
    } else {
        format!("{v:.2}")
    }
}

/// What a larger figure means.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Better {
    Higher,
    Lower,
}

/// The three columns of most tables.
const COLUMNS: [&str; 3] = ["QSD", "liveblkd", "do-nothing server"];

/// One line of a table.
pub(super) struct Row {
    pub(super) case: String,
    pub(super) figure: String,
    /// By column: lowest, median, highest.
    pub(super) values: [Option<[f64; 3]>; 3],
    /// As shown.
    pub(super) shown: [String; 3],
    pub(super) ratio: String,
}

/// A table.
pub(super) struct Section {
    pub(super) title: String,
    pub(super) columns: [&'static str; 3],
    pub(super) rows: Vec<Row>,
}

/// All tables of a run: printed line by line, and kept for the plots.
#[derive(Default)]
pub(super) struct Report(RefCell<Vec<Section>>);

impl Report {
    /// The lines that follow are about this. It is printed with the first of them.
    pub(super) fn heading(&self, title: &str) {
        self.heading_with(title, COLUMNS);
    }

    /// The same, with other names for the columns.
    pub(super) fn heading_with(&self, title: &str, columns: [&'static str; 3]) {
        self.0.borrow_mut().push(Section { title: title.to_owned(), columns, rows: Vec::new() });
    }

    /// One line; without a case it belongs to the case before. The ratio is written so that above 1 is better for us,
    /// whatever the figure.
    pub(super) fn row(&self, case: &str, figure: &str, better: Better, figures: &Figures) {
        let sides = [Side::Qsd, Side::Liveblk, Side::Nothing];
        let ratio = match (figures.median(Side::Qsd), figures.median(Side::Liveblk)) {
            (Some(q), Some(l)) if q > 0.0 && l > 0.0 => {
                let r = if better == Better::Higher { l / q } else { q / l };
                format!("{r:.2}x")
            }
            _ => "-".to_owned(),
        };
        let row = Row {
            case: case.to_owned(),
            figure: figure.to_owned(),
            values: sides.map(|s| figures.spread(s)),
            shown: sides.map(|s| figures.shown(s)),
            ratio,
        };
        let mut sections = self.0.borrow_mut();
        let Some(section) = sections.last_mut() else { return };
        let line = |case: &str, figure: &str, [a, b, c]: [&str; 3], ratio: &str| {
            println!("{case:<46} {figure:<12} {a:>24} {b:>24} {ratio:>8} {c:>24}");
        };
        if section.rows.is_empty() {
            println!("\n{}", section.title);
            line("case", "figure", section.columns, "ratio");
        }
        line(case, figure, row.shown.each_ref().map(String::as_str), &row.ratio);
        section.rows.push(row);
    }

    /// What was measured; tables without a line are left out.
    pub(super) fn sections(&self) -> Ref<'_, [Section]> {
        self.0.borrow_mut().retain(|s| !s.rows.is_empty());
        Ref::map(self.0.borrow(), Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        let mut f = Figures::default();
        [30000.0, 10000.0, 20000.0].into_iter().for_each(|v| f.add(Side::Qsd, v));
        assert_eq!(f.shown(Side::Qsd), "20.0k [10.0k-30.0k]");
        assert_eq!(f.shown(Side::Liveblk), "-");
    }
}
