//! The command line as a list of options in the order given; nothing is done here.
//!
//! As `getopt_long` has it: `--name value`, `--name=value`, unambiguous beginnings of names, `-V`, `-Tvalue`; `--` ends the
//! options. Whatever is no option is refused: QSD takes no positional arguments.

/// The options, in alphabetical order; before them what is none.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Name {
    Argument,
    Blockdev,
    Chardev,
    Daemonize,
    Export,
    Help,
    Monitor,
    NbdServer,
    Object,
    Pidfile,
    StateDir,
    Trace,
    Version,
}

/// Name, long form, short form, whether it takes a value.
const ALL: [(Name, &str, Option<char>, bool); 12] = [
    (Name::Blockdev, "blockdev", None, true),
    (Name::Chardev, "chardev", None, true),
    (Name::Daemonize, "daemonize", None, false),
    (Name::Export, "export", None, true),
    (Name::Help, "help", Some('h'), false),
    (Name::Monitor, "monitor", None, true),
    (Name::NbdServer, "nbd-server", None, true),
    (Name::Object, "object", None, true),
    (Name::Pidfile, "pidfile", None, true),
    (Name::StateDir, "state-dir", None, true),
    (Name::Trace, "trace", Some('T'), true),
    (Name::Version, "version", Some('V'), false),
];

/// One option with its value.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Given {
    pub(crate) name: Name,
    /// The value; empty where there is none.
    pub(crate) value: String,
    /// As it was written, for messages.
    pub(crate) shown: String,
}

/// Reads the arguments after the program's name: the options before the first that is not understood, and what is wrong with
/// that one. An argument that is no option is wrong when its turn comes, after the options before it have taken effect.
pub(crate) fn read(arguments: &[String]) -> (Vec<Given>, Result<(), String>) {
    let mut out = Vec::new();
    let mut rest = arguments.iter();
    let argument = |a: &String| Given { name: Name::Argument, value: String::new(), shown: a.clone() };
    while let Some(word) = rest.next() {
        if word == "--" {
            break;
        }
        let read = if let Some(long) = word.strip_prefix("--") {
            read_long(word, long, &mut rest).map(|given| out.push(given))
        } else if let Some(short) = word.strip_prefix('-').filter(|s| !s.is_empty()) {
            read_short(word, short, &mut rest, &mut out)
        } else {
            out.push(argument(word));
            Ok(())
        };
        if read.is_err() {
            return (out, read);
        }
    }
    out.extend(rest.map(argument));
    (out, Ok(()))
}

fn read_long<'a>(
    argument: &str,
    long: &str,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<Given, String> {
    let (word, value) = match long.split_once('=') {
        Some((word, value)) => (word, Some(value)),
        None => (long, None),
    };
    let fitting: Vec<_> = ALL.iter().filter(|(_, l, _, _)| l.starts_with(word)).collect();
    let exact = fitting.iter().find(|(_, l, _, _)| *l == word);
    let (name, full, _, takes) = match (exact, fitting.as_slice()) {
        (Some(one), _) => **one,
        (None, [one]) => **one,
        (None, []) => return Err(format!("unrecognized option '{argument}'")),
        (None, several) => {
            let names: Vec<_> = several.iter().map(|(_, l, _, _)| format!("'--{l}'")).collect();
            return Err(format!("option '{argument}' is ambiguous; possibilities: {}", names.join(" ")));
        }
    };
    let shown = format!("--{word}");
    match (takes, value) {
        (false, None) => Ok(Given { name, value: String::new(), shown }),
        (false, Some(_)) => Err(format!("option '--{full}' doesn't allow an argument")),
        (true, Some(value)) => Ok(Given { name, value: value.to_owned(), shown: argument.to_owned() }),
        (true, None) => match rest.next() {
            Some(value) => Ok(Given { name, value: value.clone(), shown: format!("{shown} {value}") }),
            None => Err(format!("option '--{full}' requires an argument")),
        },
    }
}

fn read_short<'a>(
    argument: &str,
    letters: &str,
    rest: &mut impl Iterator<Item = &'a String>,
    out: &mut Vec<Given>,
) -> Result<(), String> {
    for (i, letter) in letters.char_indices() {
        let Some((name, _, _, takes)) = ALL.iter().find(|(_, _, s, _)| *s == Some(letter)) else {
            return Err(format!("invalid option -- '{letter}'"));
        };
        if !takes {
            out.push(Given { name: *name, value: String::new(), shown: argument.to_owned() });
            continue;
        }
        let attached = &letters[i + letter.len_utf8()..];
        let value = match attached {
            "" => rest.next().cloned().ok_or_else(|| format!("option requires an argument -- '{letter}'"))?,
            attached => attached.to_owned(),
        };
        out.push(Given { name: *name, shown: format!("-{letter} {value}"), value });
        return Ok(());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Vec<(Name, String)>, String> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let (given, read) = read(&words);
        read.map(|()| given.into_iter().map(|g| (g.name, g.value)).collect())
    }

    #[test]
    fn forms() {
        let v = |n: Name, s: &str| (n, s.to_owned());
        assert_eq!(run("--blockdev a --blockd=b"), Ok(vec![v(Name::Blockdev, "a"), v(Name::Blockdev, "b")]));
        assert_eq!(
            run("-V -Tx -T y"),
            Ok(vec![v(Name::Version, ""), v(Name::Trace, "x"), v(Name::Trace, "y")])
        );
        assert_eq!(run("--daemonize --pidfile p"), Ok(vec![v(Name::Daemonize, ""), v(Name::Pidfile, "p")]));
    }

    #[test]
    fn what_is_before_an_error_and_what_is_no_option() {
        let words = ["-V", "x", "--bogus"].map(str::to_owned);
        let (given, read) = read(&words);
        assert_eq!(given.iter().map(|g| g.name).collect::<Vec<_>>(), [Name::Version, Name::Argument]);
        assert_eq!(read, Err("unrecognized option '--bogus'".to_owned()));
        assert_eq!(run("-- x").map(|all| all.len()), Ok(1));
    }

    #[test]
    fn errors() {
        for (line, want) in [
            ("--bogus", "unrecognized option '--bogus'"),
            ("--blockdev", "option '--blockdev' requires an argument"),
            ("-x", "invalid option -- 'x'"),
            ("--version=3", "option '--version' doesn't allow an argument"),
            ("--daemonize=3", "option '--daemonize' doesn't allow an argument"),
        ] {
            assert_eq!(run(line), Err(want.to_owned()), "{line}");
        }
    }
}
