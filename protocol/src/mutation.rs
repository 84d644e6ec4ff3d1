//! The protocol, broken on purpose: one rule of those argued in `server.rs` each. The sessions ask at the
//! place where they keep the rule; the answer is `false` in every build but that of the tests.

/// A rule that a session can be told to break, in builds with the feature `mutations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "mutations"), expect(unreachable_pub, reason = "public in test builds"))]
pub enum Mutation {
    /// Send repairs of keys that were updated meanwhile.
    NoSuppression,
    /// Begin to record updated keys when the snapshot is there, not before asking for it.
    RecordAfterSnapshot,
    /// Stop recording when the walk is done, not with the last repair.
    RecordingEndsWithWalk,
    /// Send a repair although the stream has not reached the revision at which it was read.
    NoHold,
    /// Listen to a Differ whatever diff it belongs to.
    StaleDiffer,
    /// Go on with a diff although the stream jumped.
    JumpKeepsDiff,
    /// Keep the position while a shortened catch-up runs.
    CatchUpKeepsPosition,
}

/// Which rule a session breaks: none, in every build but that of the tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Broken {
    #[cfg(feature = "mutations")]
    rule: Option<Mutation>,
}

impl Broken {
    #[cfg(feature = "mutations")]
    pub(crate) fn by(rule: Mutation) -> Self {
        Self { rule: Some(rule) }
    }

    /// Asked at the place where the rule is kept.
    #[cfg_attr(not(feature = "mutations"), expect(clippy::unused_self, reason = "one shape"))]
    pub(crate) fn breaks(self, rule: Mutation) -> bool {
        #[cfg(feature = "mutations")]
        return self.rule == Some(rule);
        #[cfg(not(feature = "mutations"))]
        {
            let _: Mutation = rule;
            false
        }
    }
}
