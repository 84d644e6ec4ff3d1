//! The `tablecast` command.

fn main() {}
