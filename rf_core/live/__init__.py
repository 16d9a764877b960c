"""A stream that is steered while it runs: commands in, events out, a log that makes it again.

`Session` is the way in. It knows neither ComfyUI nor a server: a node, a terminal and HTTP are
hands on it, which put commands in its inbox and read its outbox.
"""

from .buffers import (
    Applied,
    Branched,
    Ended,
    Happened,
    Inbox,
    Outbox,
    Picture,
    Reader,
    ReaderLagged,
    Received,
    Refused,
)
from .commands import (
    Command,
    Cut,
    Decay,
    Drop,
    Lora,
    Move,
    Pause,
    Prompt,
    Resume,
    Rewind,
    Schedule,
    Stop,
    Strength,
    read_command,
)
from .fragments import FragmentSequence, codec_of
from .history import Limits
from .log import Log, digest_of, read_log
from .osc import OscServer
from .record import Autosave, Recorder, VideoRecorder
from .replay import replay_log
from .session import Session, Status
from .transition import MAX_COMING, Branch

__all__ = [
    "MAX_COMING",
    "Applied",
    "Autosave",
    "Branch",
    "Branched",
    "Command",
    "Cut",
    "Decay",
    "Drop",
    "Ended",
    "FragmentSequence",
    "Happened",
    "Inbox",
    "Limits",
    "Log",
    "Lora",
    "Move",
    "OscServer",
    "Outbox",
    "Pause",
    "Picture",
    "Prompt",
    "Reader",
    "ReaderLagged",
    "Received",
    "Recorder",
    "Refused",
    "Resume",
    "Rewind",
    "Schedule",
    "Session",
    "Status",
    "Stop",
    "Strength",
    "VideoRecorder",
    "codec_of",
    "digest_of",
    "read_command",
    "read_log",
    "replay_log",
]
