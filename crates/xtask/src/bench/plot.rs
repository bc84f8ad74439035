//! The tables of a run as one picture (SVG): a group of bars for each line, its longest value as wide as the picture has room, so that the
//! bar of the physical limit, where there is one, is what the others can be compared with.

use super::table::{Row, Section};
use std::fmt::Write;

const WIDTH: u32 = 1180;
/// Where the bars begin, and how long the longest is.
const LEFT: u32 = 460;
const ROOM: u32 = 400;
/// Height of a bar, and of what is between two groups of them.
const BAR: u32 = 9;
const GAP: u32 = 12;
const TITLE: u32 = 44;
const COLOURS: [&str; 3] = ["#b07d3c", "#2f6f9f", "#b8bcc0"];

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The picture of these tables; `about` stands at its top.
pub(super) fn svg(about: &str, sections: &[Section]) -> String {
    let mut body = String::new();
    let mut y = 30;
    text(&mut body, 20, y, "font-weight=\"bold\"", about);
    for section in sections {
        y += TITLE;
        text(&mut body, 20, y, "font-weight=\"bold\"", &section.title);
        y += 20;
        for ((name, colour), x) in section.columns.iter().zip(COLOURS).zip([0, 200, 400]) {
            bar(&mut body, [LEFT + x, y - BAR, 14, BAR], colour);
            text(&mut body, LEFT + x + 20, y, "", name);
        }
        let mut case = "";
        for row in &section.rows {
            y += GAP;
            if !row.case.is_empty() {
                case = &row.case;
            }
            y = group(&mut body, y, case, row);
        }
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{0}\" viewBox=\"0 0 {WIDTH} {0}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n",
        y + 30
    )
}

/// The bars of one line from `y` on; where they end.
fn group(out: &mut String, mut y: u32, case: &str, row: &Row) -> u32 {
    text(out, 20, y + 2 * BAR, "", &format!("{case}: {}", row.figure));
    text(out, WIDTH - 90, y + 2 * BAR, "font-weight=\"bold\"", &row.ratio);
    let longest = row.values.iter().flatten().map(|v| v[2]).fold(f64::MIN_POSITIVE, f64::max);
    let long = |value: f64| (value / longest * f64::from(ROOM)).round() as u32;
    for ((value, shown), colour) in row.values.iter().zip(&row.shown).zip(COLOURS) {
        if let Some([low, middle, high]) = *value {
            bar(out, [LEFT, y, long(middle), BAR - 1], colour);
            bar(out, [LEFT + long(low), y + BAR / 2, long(high) - long(low), 1], "black");
            text(out, LEFT + ROOM + 10, y + BAR, "font-size=\"10\"", shown);
        }
        y += BAR;
    }
    y
}

fn bar(out: &mut String, [x, y, width, height]: [u32; 4], colour: &str) {
    let _ =
        writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>");
}

fn text(out: &mut String, x: u32, y: u32, attributes: &str, what: &str) {
    let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" {attributes}>{}</text>", escaped(what));
}

#[cfg(test)]
mod tests {
    use super::super::Side;
    use super::super::table::{Better, Figures, Report};
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_names_do_not_break_the_picture() {
        let report = Report::default();
        report.heading("empty");
        report.heading("reads & <writes>");
        let mut figures = Figures::default();
        [(Side::Qsd, 25.0), (Side::Liveblk, 50.0), (Side::Liveblk, 50.0), (Side::Nothing, 100.0)]
            .into_iter()
            .for_each(|(side, v)| figures.add(side, v));
        report.row("depth 1", "IOPS", Better::Higher, &figures);
        report.row("", "p99 us", Better::Lower, &Figures::default());
        let picture = svg("a run", &report.sections());
        for (long, colour) in [(100, COLOURS[0]), (200, COLOURS[1]), (400, COLOURS[2])] {
            let bars: Vec<&str> = picture.lines().filter(|l| l.contains(colour)).collect();
            let width = format!("width=\"{long}\"");
            assert!(bars.iter().any(|b| b.contains(&width)), "{width} is not in {bars:?}");
        }
        assert!(picture.contains("reads &amp; &lt;writes&gt;"));
        assert!(picture.contains("depth 1: p99 us"), "a line without a case is of the one before");
        assert!(!picture.contains("empty"));
        assert!(picture.contains("2.00x"));
        assert_eq!(picture.matches("<svg").count(), picture.matches("</svg>").count());
        assert_eq!(picture.matches("<text").count(), picture.matches("</text>").count());
    }
}
