//! Which messages were delivered in which states.

use tablecast_protocol::{ToClient, ToServer};

const PAGE: &str = include_str!("../../../docs/protocol.md");

/// How often each message came in each state of one end, as its table in docs/protocol.md has them.
#[derive(Clone, Debug)]
pub struct Coverage {
    states: &'static [&'static str],
    messages: &'static [(u8, &'static str)],
    /// A row a state.
    counts: Vec<u64>,
    heading: &'static str,
}

/// Cells that the page accepts or ignores, and that no honest peer can reach.
const HOSTILE: &[(&str, &str)] = &[
    // Before Welcome a client asks nothing, so that nothing is answered.
    ("Subscribing", "Ping"),
    ("Hello", "Pong"),
    // The first mark comes behind CaughtUp, and so does its root.
    ("CatchUp", "Verify"),
    // Beside a diff nothing is marked, and what was marked before it is in front of SyncStart.
    ("Diff", "Mark"),
    ("PostDiff", "Mark"),
];

impl Coverage {
    /// The server's end.
    pub fn server() -> Self {
        let states = &["Hello", "Subscribing", "CatchUp", "Relay", "Diff", "Closed"];
        Self::new(states, ToServer::TAGS, "\n### The server's end\n")
    }

    /// The client's end.
    pub fn client() -> Self {
        let states = &["Hello", "CatchUp", "Relay", "PreDiff", "Diff", "PostDiff", "Closed"];
        Self::new(states, ToClient::TAGS, "\n### The client's end\n")
    }

    fn new(
        states: &'static [&'static str],
        messages: &'static [(u8, &'static str)],
        heading: &'static str,
    ) -> Self {
        Self { states, messages, counts: vec![0; states.len() * messages.len()], heading }
    }

    /// A message of this tag came in this state, as it was sent.
    pub(crate) fn count(&mut self, state: &str, tag: u8) {
        let row = self.states.iter().position(|name| *name == state).expect("a state of the page");
        self.counts[row * self.messages.len() + usize::from(tag)] += 1;
    }

    /// Adds what another one counted.
    pub fn add(&mut self, other: &Self) {
        for (sum, count) in self.counts.iter_mut().zip(&other.counts) {
            *sum += count;
        }
    }

    /// State, message, and how often it came.
    pub fn cells(&self) -> impl Iterator<Item = (&'static str, &'static str, u64)> {
        let cells = self
            .states
            .iter()
            .flat_map(|state| self.messages.iter().map(move |(_, message)| (*state, *message)));
        cells.zip(&self.counts).map(|((state, message), count)| (state, message, *count))
    }

    /// The cells that an honest peer can reach: all that the page accepts or ignores, but for a few.
    pub fn reachable(&self) -> Vec<(&'static str, &'static str)> {
        let (_, page) = PAGE.split_once(self.heading).expect("the page has the heading");
        let lines = page.lines().skip_while(|line| !line.starts_with("| state \\ message |"));
        let row = |line: &'static str| {
            line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`'))
        };
        let mut rows = lines.take_while(|line| line.starts_with('|')).map(row);
        let messages: Vec<_> = rows.next().into_iter().flatten().skip(1).collect();
        rows.skip(1)
            .flat_map(|mut cells| {
                let state = cells.next().unwrap_or_default();
                let cells = messages.iter().copied().zip(cells).collect::<Vec<_>>();
                cells.into_iter().map(move |(message, cell)| (state, message, cell))
            })
            .filter(|(state, message, cell)| {
                *cell != "close" && !HOSTILE.contains(&(*state, *message))
            })
            .map(|(state, message, _)| (state, message))
            .collect()
    }

    fn reached(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        let reached = self.cells().filter(|(.., count)| *count > 0);
        reached.map(|(state, message, _)| (state, message))
    }

    /// The cells that were reached, and that no honest peer can reach.
    pub fn wrong(&self) -> Vec<(&'static str, &'static str)> {
        let reachable = self.reachable();
        self.reached().filter(|cell| !reachable.contains(cell)).collect()
    }

    /// Those of the reachable cells that were not reached.
    pub fn missing(&self) -> Vec<(&'static str, &'static str)> {
        let reached: Vec<_> = self.reached().collect();
        self.reachable().into_iter().filter(|cell| !reached.contains(cell)).collect()
    }
}
