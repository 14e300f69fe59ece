"""How many prompt tokens a step computes beside running streams: as many as keep it short. Learnt from steps' times."""

from __future__ import annotations

STEP_S = 0.2
"""What a step with prompt tokens may take. It is the longest that a stream waits for its next token."""
SLOW = 2.0
"""Where steps without prompt tokens are slow themselves, such a step may take so many times as long as they."""
FIRST, LEAST = 64, 16
GROWTH, CUT = 2.0, 0.25
"""By which a chunk changes at most from one step to the next: one time is not much to go by."""


class Chunks:
    """Sizes of the chunks that prompts are computed in.

    A token whose log-probabilities are asked for takes several times as long as another one, so it has its own size.

    Args:
        most: tokens of a chunk, however fast they are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._sizes = {scored: self._bounded(FIRST) for scored in (False, True)}
        self._decode_s = 0.0

    def size(self, scored: bool) -> int:
        """Tokens of one prompt that fill a step."""
        return int(self._sizes[scored])

    def measured(self, seconds: float, computed: dict[bool, int]) -> None:
        """Learn from a step.

        Args:
            computed: prompt tokens in it, by whether they were scored.
        """
        if not any(computed.values()):
            self._decode_s += 0.2 * (seconds - self._decode_s)
            return
        used = sum(count / self._sizes[scored] for scored, count in computed.items())
        share = max(STEP_S, SLOW * self._decode_s) / seconds
        for scored, count in computed.items():
            if count:
                self._sizes[scored] = self._learnt(self._sizes[scored], used, share)

    def _learnt(self, size: float, used: float, share: float) -> float:
        """A size, of which a step had ``used`` times as much, and took 1 / ``share`` of its time."""
        fits = min(max(size * used * share, CUT * size), GROWTH * size)
        return self._bounded(fits if share < 1 else max(size, fits))

    def _bounded(self, size: float) -> float:
        return float(min(max(size, LEAST), self._most))
