"""Outcomes of responses, each by the verifier of its prompt's ability."""

from collections.abc import Sequence
from types import TracebackType

from ..config.keys import Verify
from ..data import arithmetic
from ..data.prompts import ARITHMETIC
from ..models.distributed import ALONE, World
from ..records import Prompt
from ..verify import Answer, Verdict, VerifierPool
from ..verify.sandbox import SandboxUnavailable


class Outcomes:
    """Scores (prompt, response text) pairs; math, code and custom ones in killable processes, started when needed.

    Every process of the run scores its share.
    """

    def __init__(self, config: Verify, world: World = ALONE) -> None:
        self.config, self.world = config, world
        self._pool: VerifierPool | None = None

    def __call__(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        """Verdicts in order. An error or a time-out scores 0 and says so in its status. Collective.

        Raises:
            SandboxUnavailable: there are code answers and no sandbox to run them in; scoring them all 0 would train on
                nothing.
        """
        return self.world.spread(pairs, self._score)

    def _score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[Verdict]:
        verdicts: list[Verdict | None] = [None] * len(pairs)
        others: list[int] = []
        for i, (prompt, text) in enumerate(pairs):
            if prompt.ability == ARITHMETIC and self.config.custom is None:
                score = arithmetic.outcome(prompt.reference, text)
                verdicts[i] = Verdict(id=prompt.id, score=score, status="ok", seconds=0.0)
            else:
                others.append(i)
        answers = [
            Answer(
                id=f"{pairs[i][0].id}/{i}", prompt=pairs[i][0].text, response=pairs[i][1], ability=pairs[i][0].ability,
                reference=pairs[i][0].reference,
            )
            for i in others
        ]  # fmt: skip
        if answers:
            for i, verdict in zip(others, self._verifiers().verify(answers), strict=True):
                if verdict.status == "refused":
                    raise SandboxUnavailable(verdict.detail)
                verdicts[i] = verdict
        return [verdict for verdict in verdicts if verdict is not None]

    def _verifiers(self) -> VerifierPool:
        if self._pool is None:
            self._pool = VerifierPool(
                workers=self.config.workers, deadline_s=self.config.deadline, custom=self.config.custom,
                unsafe=self.config.unsafe, extract=self.config.extract,
            )  # fmt: skip
        return self._pool

    def __enter__(self) -> "Outcomes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.close()
