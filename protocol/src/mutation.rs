//! The protocol, broken on purpose: one rule of those argued in `server.rs` and `client.rs` each, and of who is
//! resumed. The code asks at the place where it keeps the rule; the answer is `false` in every build but that of
//! the tests. Which test notices which is in docs/model.md.

/// A rule that a session or a log can be told to break, in builds with the feature `mutations`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(not(feature = "mutations"), expect(unreachable_pub, reason = "public in test builds"))]
pub enum Mutation {
    // The server's session: rules 1 to 8 of `server.rs`.
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
    /// Send deletes of keys that were updated meanwhile.
    NoDeleteSuppression,
    /// Leave out what is updated when a repair is read, not when it is sent.
    SuppressAtReading,
    /// Leave out the first key of each part of what is read.
    PartCutShort,
    /// Say that a diff is done before the stream stands at its mark.
    EndMarkOvertakes,
    /// Send what is behind the mark of a diff before saying that it is done.
    LivePassesMark,
    /// Compare with the root that a diff was asked with before a jump.
    StaleRoot,
    /// Give an answer to the Differ whatever diff it is of.
    AnswerOfAnyDiff,

    // The server's session: bounds, and what a peer may say.
    /// Remember more updated keys than are allowed.
    UpdatedUnbounded,
    /// Send the next repair however many are not acknowledged.
    NoWindow,
    /// Take an acknowledgement whatever diff it is of.
    AckOfAnyDiff,
    /// Send a repair that deletes more than the follower allows.
    HeldRepairsSent,
    /// Take a diff number that was used before.
    DiffNumberTwice,
    /// Begin a diff while the roots at the end of the last one are compared.
    DiffWhileComparing,
    /// Leave out what a follower that is resumed has missed.
    ResumeAtHead,
    /// Say that all that was missed is sent before it is.
    CaughtUpEarly,
    /// Say that the stream stands at a checkpoint wherever it stands.
    MarkAnywhere,

    // The client's session.
    /// Keep the position while a shortened catch-up runs.
    CatchUpKeepsPosition,
    /// Have a position without being resumed from one.
    NewcomerHasPosition,
    /// Take a `Welcome` that resumes elsewhere than at the position that was presented.
    ResumedElsewhere,
    /// Take live changes of another history.
    ChainUnchecked,
    /// Keep the position when the stream jumps.
    JumpKeepsPosition,
    /// Have a position when a walk is done, before its repairs are there.
    PositionBeforeRepairs,
    /// Have a position at the end of a diff although keys could not be repaired.
    FailedKeepsPosition,
    /// Keep the position when the store refuses a change.
    RefusedKeepsPosition,
    /// Have a position at the end of a diff in which the store refused a change.
    RefusalForgotten,
    /// Keep the position although the roots differ.
    UnequalKeepsPosition,
    /// Apply a repair that deletes more than is allowed.
    HeldRepairsTaken,
    /// Compare with the server's root at another mark.
    VerifyAnyMark,
    /// Compare roots although something is missing.
    MarkWhileMissing,

    // The log.
    /// Resume by revision and epoch, whatever the chain.
    ResumeAnyChain,
    /// Resume by revision and chain, whatever the epoch.
    ResumeAnyEpoch,
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
