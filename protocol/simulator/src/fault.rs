//! What goes wrong in a run, by name.

macro_rules! faults {
    ($( $(#[$doc:meta])* $name:ident, )*) => {
        /// A kind of fault. Most are done to the world by the scheduler; some, as noted, are what follows
        /// from others, and are counted where they show.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Fault { $( $(#[$doc])* $name, )* }

        impl Fault {
            /// All of them.
            pub const ALL: &'static [Self] = &[$( Self::$name ),*];

            /// What people call it.
            pub fn name(self) -> &'static str {
                match self { $( Self::$name => stringify!($name), )* }
            }
        }
    };
}

faults! {
    /// Connection cut while neither end has heard anything.
    CutBeforeHandshake,
    /// Connection cut between `Hello` and `Welcome`.
    CutInHandshake,
    /// Connection cut while only live changes flow.
    CutInRelay,
    /// Connection cut while a diff is asked for and has not begun.
    CutBeforeDiff,
    /// Connection cut during the walk.
    CutInWalk,
    /// Connection cut between two repairs.
    CutInRepairs,
    /// Connection cut in a shortened catch-up.
    CutInCatchUp,
    /// Connection cut while roots are compared at the end of a diff.
    CutWithMarkOpen,
    /// One end is gone, and what it said last still arrives.
    CutLate,
    /// One end is gone, and the other is not told.
    Vanished,
    /// Server restarts with its table and its position.
    ServerContinued,
    /// Server restarts with its table, in a new history.
    ServerRestarted,
    /// Server restarts with an older table and the position that belongs to it.
    ServerRestored,
    /// Server restarts with nothing.
    ServerEmptied,
    /// Server stops in an orderly way, and restarts.
    ServerStopped,
    /// Follower stops in an orderly way, and restarts with its position.
    FollowerStopped,
    /// Follower restarts with its table and without a position.
    FollowerRestarted,
    /// Follower restarts with an older table and the position that belongs to it.
    FollowerRestored,
    /// Follower restarts with its table and a position from before.
    StalePosition,
    /// Follower connects while the server still has its last connection.
    DuplicateConnection,
    /// Server refuses a connection: too many.
    RefusedConnection,
    /// An end closes a connection because of something within itself.
    Failed,
    /// Follower reads little at a time.
    SlowReader,
    /// Follower reads nothing for long, while the server's log moves on.
    StalledReader,
    /// Follower falls behind (follows from others).
    FellBehind,
    /// Answers of the Server to a Middleman are late.
    LateReply,
    /// Steps of a Differ are late.
    LateDiffer,
    /// A Differ speaks up after its diff, beside the next one (follows from others).
    StaleDiffer,
    /// A Differ ends without a result.
    LostDiffer,
    /// Too many diffs wait already (follows from others).
    Busy,
    /// A diff gives way to others that wait, wherever it is.
    TurnEnded,
    /// More keys are updated in a diff than are remembered (follows from others).
    UpdatedOverflow,
    /// A diff is given up because nothing happens in it (follows from others).
    DiffStalled,
    /// Follower's store refuses a key.
    RefusedKey,
    /// Follower's store refuses everything.
    RefusedAll,
    /// Follower's store refuses everything for a few changes.
    RefusedShortly,
    /// Server's store refuses a batch.
    RefusedWrite,
    /// Follower's store cannot be read at a mark.
    UnreadStore,
    /// A bit of a stored value of a follower flips.
    FlippedValue,
    /// A key of a follower is gone, behind its back.
    RemovedKey,
    /// A follower has a key too many, behind its back.
    ExtraKey,
    /// A bit of a stored value of the server flips.
    FlippedServerValue,
    /// Somebody writes to a follower itself.
    OwnWrite,
    /// Everything for the server waits, with acknowledgements among it.
    DelayedAcks,
    /// One connection goes on alone while others wait.
    Reordered,
    /// A handshake takes too long (follows from others).
    HelloTimeout,
    /// An end hears nothing for too long (follows from others).
    Silence,
    /// The clock leaps.
    TimeLeap,
    /// A bit flips on its way to the server.
    BitToServer,
    /// A bit flips on its way to a follower.
    BitToClient,
    /// A repair is held, since it would delete too much (follows from others).
    HeldDelete,
}
