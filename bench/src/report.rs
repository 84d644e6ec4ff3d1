//! One answer to one question: as a JSON object, or as lines to read.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::Value;

/// A question with its parameters and figures, in the order in which they are told.
#[derive(Debug)]
pub(crate) struct Report {
    fields: Vec<(&'static str, Value)>,
}

impl Report {
    pub(crate) fn of(question: &str) -> Self {
        Self { fields: vec![("question", question.into())] }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.fields.push((name, value.into()));
        self
    }

    pub(crate) fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
        } else {
            println!("{self}");
        }
        Ok(())
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.fields.iter().map(|(name, value)| (name, value)))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.fields.iter().try_for_each(|(name, value)| writeln!(f, "{name:28} {value}"))
    }
}

/// A figure with three digits behind the point: more are noise.
pub(crate) fn rounded(figure: f64) -> f64 {
    (figure * 1e3).round() / 1e3
}
