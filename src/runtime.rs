//! Threads for the actors: arbiters of the actix System at hand, or of one of our own.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use actix_rt::{Arbiter, ArbiterHandle, System};

use crate::Error;

/// By how much the threads that compute are nicer than those that pass changes on: enough that a change
/// which comes while they have the only free processor has it at once.
#[cfg(target_os = "linux")]
const NICE: i32 = 10;

/// Some arbiters. They end when this is dropped.
#[derive(Debug)]
pub(crate) struct Runtime {
    arbiters: Vec<ArbiterHandle>,
    /// A program without an actix System gets one on a thread of its own.
    own: Option<(System, JoinHandle<()>)>,
}

impl Runtime {
    /// Starts `count` threads (and one more, without a System at hand), of which the last `computing` give
    /// way to others.
    pub(crate) fn start(count: usize, computing: usize) -> Result<Self, Error> {
        let arbiters = move || {
            let all = (0..count).map(|_| arbiter()).collect::<io::Result<Vec<_>>>()?;
            for arbiter in all.iter().rev().take(computing) {
                arbiter.spawn_fn(give_way);
            }
            Ok(all)
        };
        if System::try_current().is_some() {
            return Ok(Self { arbiters: arbiters().map_err(Error::Io)?, own: None });
        }
        let (sender, receiver) = mpsc::channel();
        let thread = std::thread::Builder::new().name("tablecast".to_owned()).spawn(move || {
            let system = System::new();
            let started = (System::current(), system.block_on(async { arbiters() }));
            // Nobody waits only if the thread that started us is gone.
            if sender.send(started).is_ok() {
                drop(system.run());
            }
        });
        let thread = thread.map_err(Error::Io)?;
        let (system, arbiters) = receiver.recv().map_err(|_| Error::Stopped)?;
        Ok(Self { arbiters: arbiters.map_err(Error::Io)?, own: Some((system, thread)) })
    }

    /// The arbiters.
    pub(crate) fn arbiters(&self) -> &[ArbiterHandle] {
        &self.arbiters
    }
}

/// An arbiter whose blocking calls (roots, answers) are computed by threads that give way.
fn arbiter() -> io::Result<ArbiterHandle> {
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().on_thread_start(give_way).build()
    };
    Ok(Arbiter::try_with_tokio_rt(runtime)?.handle())
}

/// Makes this thread a nice one where a thread can be that by itself.
fn give_way() {
    #[cfg(target_os = "linux")]
    // Whoever may not is as fast as ever.
    rustix::process::nice(NICE).ok();
}

impl Drop for Runtime {
    fn drop(&mut self) {
        for arbiter in &self.arbiters {
            arbiter.stop();
        }
        if let Some((system, _)) = &self.own {
            system.stop();
        }
    }
}
