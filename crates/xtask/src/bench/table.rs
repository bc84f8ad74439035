//! Figures of one case and how they are printed.

use super::Side;
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

    /// `12.3k [11.0k-14.1k]`.
    fn shown(&self, side: Side) -> String {
        let v = self.sorted(side);
        match (v.first(), self.median(side), v.last()) {
            (Some(low), Some(middle), Some(high)) => {
                format!("{} [{}-{}]", short(middle), short(*low), short(*high))
            }
            _ => "-".to_owned(),
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

pub(super) fn heading(title: &str) {
    println!("\n{title}");
    println!(
        "{:<46} {:<12} {:>24} {:>24} {:>8} {:>24}",
        "case", "figure", "QSD", "liveblkd", "ratio", "do-nothing server"
    );
}

/// One line. The ratio is written so that above 1 is better for us, whatever the figure.
pub(super) fn row(case: &str, figure: &str, better: Better, figures: &Figures) {
    let ratio = match (figures.median(Side::Qsd), figures.median(Side::Liveblk)) {
        (Some(q), Some(l)) if q > 0.0 && l > 0.0 => {
            let r = if better == Better::Higher { l / q } else { q / l };
            format!("{r:.2}x")
        }
        _ => "-".to_owned(),
    };
    println!(
        "{case:<46} {figure:<12} {:>24} {:>24} {ratio:>8} {:>24}",
        figures.shown(Side::Qsd),
        figures.shown(Side::Liveblk),
        figures.shown(Side::Nothing)
    );
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
