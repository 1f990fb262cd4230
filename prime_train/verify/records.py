"""What goes into a verifier and what comes out."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "timeout", "error", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response to be scored.

    ability: "math" or "code"; a verifier of one's own may be given anything.
    reference: the reference answer of a math problem; the JSON of a code problem's tests (code.py says in which forms).
    """

    id: str
    prompt: str
    response: str
    ability: str
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """score in [0, 1]; seconds is the time that scoring took.

    status: "ok", scored (a wrong answer too); "timeout", it ran out of time, in whole or in part (the tests of a code
    answer that did end count); "error", the verifier failed: an unreadable reference, a crash; "refused", code that was
    not run since there is no sandbox. `detail` says why where the status is not "ok".
    """

    id: str
    score: float
    status: Status
    seconds: float
    detail: str = ""
