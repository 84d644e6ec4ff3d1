//! The `tablecast` command; see [`tablecast::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    tablecast::cli::run()
}
