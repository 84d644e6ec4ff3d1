//! `compare`: every claim about speed, each beside whom it is about, as far as they are installed.

mod catch_up;
pub(crate) mod fanout;
pub(crate) mod load;
pub(crate) mod peer;
pub(crate) mod plain;
mod reconcile;
mod repair;
pub(crate) mod system;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::builder::PossibleValuesParser;
use serde_json::{Value, json};
use tablecast_bench::{KEY_BYTES, median};

use crate::machine;
use peer::Found;

/// How a row is measured.
type Measure = fn(&Bench) -> anyhow::Result<Vec<Line>>;

/// Every row: its name, the question, and how it is measured. Rows whose figures do not vary are
/// measured once.
const ROWS: [(&str, &str, Measure); 12] = [
    ("walk-cpu", "What does it cost both ends to find 1,000 of a million?", reconcile::cpu),
    (
        "walk-bytes",
        "How many bytes and rounds does it take to find what differs?",
        reconcile::bytes,
    ),
    ("empty", "How soon does an empty follower hold a million keys?", catch_up::empty),
    ("missed", "How soon does one that was away hold 10,000 changes?", catch_up::missed),
    ("fanout-100", "How much is delivered to 100?", fanout::to_100),
    ("fanout-1000", "How much is delivered to 1,000?", fanout::to_1000),
    ("fanout-1k", "How much is delivered to 100, values of 1 KiB?", fanout::large_values),
    ("one", "How soon does one idle follower have a write?", fanout::one_follower),
    ("paced-1000", "How soon do 1,000 have 1,000 writes a second?", fanout::paced),
    ("repair", "What does a repair of 100,000 keys do to ten followers?", repair::live),
    ("diff-1000", "What do diffs do to the stream of 1,000 followers?", fanout::during_diffs),
    ("memory", "How much memory does an idle follower cost?", fanout::memory),
];

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Only these rows; all if none is given.
    #[arg(long, value_delimiter = ',', value_parser = PossibleValuesParser::new(names()))]
    only: Vec<String>,
    /// Small tables, few followers, short times: to see that it works. The figures mean nothing.
    #[arg(long)]
    quick: bool,
    /// Times that each row is measured, each time beside its peers. Figures are medians.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    runs: u64,
    /// Bytes of keys and values that are on their way to each follower at most, where a system is given
    /// all that it takes.
    #[arg(long, default_value_t = 256 << 10)]
    in_flight_bytes: u64,
    /// Only Tablecast, also where peers are installed.
    #[arg(long)]
    alone: bool,
    /// Where everything is written to.
    #[arg(long, value_name = "FILE", default_value = "target/compare.json")]
    json: PathBuf,
}

fn names() -> Vec<&'static str> {
    ROWS.iter().map(|(name, ..)| *name).collect()
}

/// What all rows are measured with.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) found: Found,
    quick: bool,
    in_flight_bytes: u64,
}

impl Bench {
    /// So many keys; a hundredth of them if it is to be quick.
    pub(crate) fn keys(&self, count: usize) -> usize {
        if self.quick { count.div_ceil(100) } else { count }
    }

    pub(crate) fn followers(&self, count: usize) -> usize {
        if self.quick { count.div_ceil(20) } else { count }
    }

    pub(crate) fn writes(&self, count: u64) -> u64 {
        if self.quick { count.div_ceil(50) } else { count }
    }

    pub(crate) fn time(&self, ms: u64) -> Duration {
        Duration::from_millis(if self.quick { ms / 20 } else { ms })
    }

    /// Changes that are on their way to each follower at most.
    pub(crate) fn window(&self, value_bytes: usize) -> u64 {
        window(self.in_flight_bytes, value_bytes)
    }
}

/// As many changes as have so many bytes of keys and values, and two units at the least.
pub(crate) fn window(bytes: u64, value_bytes: usize) -> u64 {
    let change = (KEY_BYTES + value_bytes) as u64;
    (bytes / change).max(2 * system::batch(value_bytes))
}

/// What is to be reached.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// Nothing: it is told only.
    None,
    /// At most so many times theirs.
    AtMost(f64),
    /// At least so many times theirs.
    AtLeast(f64),
    /// A figure, whatever theirs is.
    Below(f64),
    Above(f64),
}

/// One figure of ours, beside one of theirs.
#[derive(Clone, Debug)]
pub(crate) struct Line {
    what: String,
    unit: &'static str,
    ours: f64,
    whose: &'static str,
    theirs: Option<f64>,
    goal: Goal,
}

impl Line {
    pub(crate) fn new(what: String, unit: &'static str) -> Self {
        Self { what, unit, ours: f64::NAN, whose: "", theirs: None, goal: Goal::None }
    }

    pub(crate) fn ours(self, figure: impl Into<Option<f64>>) -> Self {
        Self { ours: figure.into().unwrap_or(f64::NAN), ..self }
    }

    /// `None` if that peer is not there.
    pub(crate) fn theirs(self, whose: &'static str, figure: impl Into<Option<f64>>) -> Self {
        Self { whose, theirs: figure.into(), ..self }
    }

    pub(crate) fn goal(self, goal: Goal) -> Self {
        Self { goal, ..self }
    }

    fn ratio(&self) -> Option<f64> {
        self.theirs.map(|theirs| self.ours / theirs)
    }

    /// `None` if there is nothing to be reached, or nobody to be compared with.
    fn met(&self) -> Option<bool> {
        match self.goal {
            Goal::None => None,
            Goal::AtMost(times) => self.ratio().map(|ratio| ratio <= times),
            Goal::AtLeast(times) => self.ratio().map(|ratio| ratio >= times),
            Goal::Below(figure) => Some(self.ours <= figure),
            Goal::Above(figure) => Some(self.ours >= figure),
        }
    }

    fn reach(&self) -> String {
        match self.goal {
            Goal::None => String::new(),
            Goal::AtMost(times) => format!("at most {}x", short(times)),
            Goal::AtLeast(times) => format!("at least {}x", short(times)),
            Goal::Below(figure) => format!("at most {}", short(figure)),
            Goal::Above(figure) => format!("at least {}", short(figure)),
        }
    }

    fn table_row(&self) -> String {
        let Self { what, unit, whose, theirs, .. } = self;
        let theirs = match theirs {
            Some(figure) => format!("{whose}: {}", short(*figure)),
            None if whose.is_empty() => String::new(),
            None => format!("{whose}: not there"),
        };
        let ratio = self.ratio().map(short).unwrap_or_default();
        let met = self.met().map_or("", |met| if met { "met" } else { "**not met**" });
        let (ours, reach) = (short(self.ours), self.reach());
        format!("| {what} ({unit}) | {ours} | {theirs} | {ratio} | {reach} | {met} |")
    }

    fn json(&self, row: &str) -> Value {
        json!({
            "row": row,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "whose": self.whose,
            "theirs": self.theirs,
            "ratio": self.ratio(),
            "reach": self.reach(),
            "met": self.met(),
        })
    }
}

/// Three digits that count.
pub(crate) fn short(figure: f64) -> String {
    match figure.abs() {
        size if size >= 1e6 => format!("{:.2}M", figure / 1e6),
        size if size >= 100.0 => format!("{figure:.0}"),
        size if size >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.3}"),
    }
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    // A thousand followers need a socket at either end.
    let files = machine::open_files()?;
    let machine = machine::describe();
    let mut found = Found::look()?;
    if args.alone {
        (found.redis, found.nats) = (None, None);
    }
    let conditions = json!({
        "machine": machine,
        "processors": found.cores.tell(),
        "open_files": files,
        "in_flight_bytes": args.in_flight_bytes,
        "runs": args.runs,
        "quick": args.quick,
        "peers": peers(&found),
    });
    println!("{conditions:#}\n");
    let bench = Bench { found, quick: args.quick, in_flight_bytes: args.in_flight_bytes };

    println!("| question | ours | theirs | ratio | reach | |\n|---|---|---|---|---|---|");
    let mut lines = Vec::new();
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| only == name);
    for (name, question, measure) in ROWS.into_iter().filter(|(name, ..)| wanted(name)) {
        println!("| **{name}**: {question} | | | | | |");
        let runs: Vec<_> = (0..args.runs)
            .map(|_| measure(&bench).with_context(|| format!("row {name}")))
            .collect::<Result<_, _>>()?;
        for line in medians(&runs) {
            println!("{}", line.table_row());
            lines.push(line.json(name));
        }
    }
    let all = json!({ "conditions": conditions, "lines": lines });
    if let Some(folder) = args.json.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&args.json, format!("{all:#}\n"))
        .with_context(|| format!("cannot write {}", args.json.display()))?;
    println!("\nwritten to {}", args.json.display());
    Ok(())
}

/// The lines of the first run, with the medians of all.
fn medians(runs: &[Vec<Line>]) -> Vec<Line> {
    let of = |number: usize, figure: fn(&Line) -> Option<f64>| {
        let figures: Vec<_> =
            runs.iter().filter_map(|lines| lines.get(number).and_then(figure)).collect();
        (!figures.is_empty()).then(|| median(figures))
    };
    let first = runs.first().map_or(&[][..], |lines| lines);
    let middle = |(number, line): (usize, &Line)| {
        let ours = of(number, |line| Some(line.ours)).unwrap_or(f64::NAN);
        Line { ours, theirs: of(number, |line| line.theirs), ..line.clone() }
    };
    first.iter().enumerate().map(middle).collect()
}

/// Which peers are there, in which version and how set; and why others are not.
fn peers(found: &Found) -> Value {
    let version = |path: &Option<PathBuf>, conf: &str| match path {
        Some(path) => json!({
            "version": machine::said(&path.to_string_lossy(), &["--version"]),
            "set": conf.lines().collect::<Vec<_>>(),
        }),
        None => "not found in PATH: its figures are left out".into(),
    };
    json!({
        "redis-server": version(&found.redis, peer::REDIS_CONF),
        "nats-server": version(&found.nats, peer::NATS_CONF),
        "negentropy": "32-byte ids, no frame limit",
        "riblt": "32-byte ids; up to 1,000 keys that differ, since its decoder is quadratic",
        "merkle-search-tree": "left out: it cannot delete, and the rows do",
    })
}

#[cfg(test)]
mod tests {
    use super::{Goal, Line, medians, short};

    #[test]
    fn what_is_met() {
        let line = |goal| Line::new("it".into(), "s").ours(3.0).theirs("them", 2.0).goal(goal);
        assert_eq!(line(Goal::AtMost(1.5)).met(), Some(true));
        assert_eq!(line(Goal::AtLeast(1.6)).met(), Some(false));
        assert_eq!(line(Goal::Below(2.9)).met(), Some(false));
        assert_eq!(line(Goal::None).met(), None);
        let alone = Line::new("it".into(), "s").ours(3.0).theirs("them", None);
        assert_eq!(alone.goal(Goal::AtMost(1.0)).met(), None);
    }

    #[test]
    fn medians_of_runs() {
        let run = |ours| vec![Line::new("it".into(), "s").ours(ours).theirs("them", 2.0 * ours)];
        let lines = medians(&[run(5.0), run(1.0), run(3.0)]);
        assert_eq!((lines[0].ours, lines[0].theirs), (3.0, Some(6.0)));
    }

    #[test]
    fn figures_are_short() {
        let figures = [41_234_567.0, 123.4, 12.34, 1.2344].map(short);
        assert_eq!(figures, ["41.23M", "123", "12.3", "1.234"]);
    }
}
