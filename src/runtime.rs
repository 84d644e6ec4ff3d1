//! Threads for the actors: arbiters of the actix System at hand, or of one of our own.

use std::sync::mpsc;
use std::thread::JoinHandle;

use actix_rt::{Arbiter, ArbiterHandle, System};

use crate::Error;

/// Some arbiters. They end when this is dropped.
#[derive(Debug)]
pub(crate) struct Runtime {
    arbiters: Vec<ArbiterHandle>,
    /// A program without an actix System gets one on a thread of its own.
    own: Option<(System, JoinHandle<()>)>,
}

impl Runtime {
    /// Starts `count` threads (and one more, without a System at hand).
    pub(crate) fn start(count: usize) -> Result<Self, Error> {
        let arbiters = move || (0..count).map(|_| Arbiter::new().handle()).collect();
        if System::try_current().is_some() {
            return Ok(Self { arbiters: arbiters(), own: None });
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
        Ok(Self { arbiters, own: Some((system, thread)) })
    }

    /// The arbiters.
    pub(crate) fn arbiters(&self) -> &[ArbiterHandle] {
        &self.arbiters
    }
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
