"""For how long a save stops training where storage takes 20 MB/s, and what all saves of a run cost under ``auto``.

Two ranks share a pipe of that width, each has half of it. Saves take turns with training steps: ours in the background,
the same with training waiting for its end, and DeepSpeed's ``save_checkpoint`` of the same engine, all through that
pipe. Then the training loop runs under ``checkpoint.every: auto`` and is timed from its first step to its last commit;
what training stood still for saves, the wait for the last one with it, is set against all of that time.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.report import Bar, quick, report
from benchmarks.throttle import throttle
from raymodels.config import Config, validate
from raymodels.data.prepare import prepare
from raymodels.testing import run_ranks

WORKERS = 2
BYTES_PER_SECOND = 20e6
STEPS, STEPS_BETWEEN = 10_000, 2  # the first are more than are ever made
BLOCKING = ("blocking", "DeepSpeed")
MILLION = 1e6


def config(folder: str, hidden_size: int) -> Config:
    words = Path(folder) / "words"
    words.mkdir()
    for page in range(20):
        counted = (f"{number} is one more than {number - 1}." for number in range(100 * page, 100 * page + 100))
        (words / f"{page}.txt").write_text("\n".join(counted))
    return validate(
        {
            "run": {"name": "blocked", "storage": f"{folder}/runs"},
            "data": {
                "source": str(words),
                "seq_len": 64,
                "eval_fraction": 0.2,
                "tokenizer": {"vocab_size": 300},
                "prepared": f"{folder}/prepared",
            },
            "model": {"arch": "llama", "hidden_size": hidden_size, "layers": 4, "heads": 4},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4, "lr": 1e-4, "report_every": 1},
            "workers": {"count": WORKERS},
            "checkpoint": {"every": "auto", "keep": 2},
            "eval": {"every": STEPS, "samples": 8},
        }
    )


def take_turns(config: Config, prepared: str, saves: int) -> dict[str, Any]:
    """Seconds for which training stood still at each save, by kind; and what memory did over the background ones."""
    import psutil  # type: ignore[import-untyped]

    from raymodels.train import loop
    from raymodels.train.meter import Phases

    throttle(BYTES_PER_SECOND / WORKERS)
    phases = Phases()
    session = loop.open_session(config, prepared, phases, lambda text: None)
    saver, engine, step = session.saver, session.engine, 0
    found: dict[str, Any] = {name: [] for name in ("background", "blocking", "DeepSpeed", "beside", "alone", "memory")}

    def take_step() -> bool:
        """Whether any rank was still writing when it began."""
        nonlocal step
        writing = saver._thread is not None and saver._thread.is_alive()
        start = time.perf_counter()
        taken = loop.optimizer_step(session, step, phases, loop.Votes(leave="resized" if writing else None))
        found["beside" if taken.leave else "alone"].append(time.perf_counter() - start)
        step += 1
        return taken.leave is not None

    def ours() -> None:
        saver.save(loop._state(config, session.fingerprint, step, 0, {}, {}))

    def waiting() -> None:
        ours()
        saver.wait()

    def deepspeed() -> None:
        engine.save_checkpoint(f"{config.place}/deepspeed", tag="turn")

    kinds: dict[str, Callable[[], None]] = {"background": ours, "blocking": waiting, "DeepSpeed": deepspeed}
    for kind, save in kinds.items():
        for _ in range(saves):
            for _ in range(STEPS_BETWEEN):
                take_step()
            start = time.perf_counter()
            save()
            found[kind].append(time.perf_counter() - start)
            while take_step():  # so that no save waits for the one before
                pass
            if kind == "background":
                found["memory"].append(psutil.Process().memory_info().rss)
    found["bytes"] = saver.outcomes()[-1].bytes
    found["copies"] = sum(copy.nbytes for copy in saver._host.values())
    return found


def run_under_auto(config: Config, prepared: str, seconds: float) -> dict[str, float]:
    """Train until asked to leave: seconds to the last commit, those of them blocked by saves, and how many commits."""
    from raymodels.train import loop
    from raymodels.train.interval import Interval
    from raymodels.train.meter import Phases
    from raymodels.train.signals import Signals, request

    throttle(BYTES_PER_SECOND / WORKERS)
    phases, found = Phases(), {"blocked": 0.0, "commits": 0.0}

    def on_report(news: dict[str, Any]) -> None:
        found["blocked"] += news["seconds"].get("blocked_by_save", 0.0)
        found["commits"] += sum(save["error"] is None for save in news["saves"])
        if time.perf_counter() - start > seconds:
            request(config.place, 1, "terminated")

    session = loop.open_session(config, prepared, phases, lambda text: None)
    start = time.perf_counter()
    with Signals(config.place, 1) as signals:
        loop.train(session, phases, on_report, signals, Interval("auto", WORKERS, 0, 0.0, time.monotonic()))
    return {**found, "seconds": time.perf_counter() - start}


def main() -> int:
    saves, hidden_size, seconds = (4, 192, 75) if quick() else (8, 384, 240)
    with tempfile.TemporaryDirectory() as folder:
        settings = config(folder, hidden_size)
        prepared = prepare(settings).place
        ranks = run_ranks(take_turns, WORKERS, settings, prepared, saves)
        autos = run_ranks(run_under_auto, WORKERS, settings, prepared, seconds)
    first = ranks[0]
    alone, beside = (statistics.median(first[kind]) for kind in ("alone", "beside"))
    blocked = {kind: max(statistics.median(rank[kind]) for rank in ranks) for kind in ("background", *BLOCKING)}
    rows = [
        {"save": kind, "state MB": first["bytes"] / MILLION, "blocked s": stood, "x": stood / blocked["background"]}
        for kind, stood in blocked.items()
    ]
    copies = sum(rank["copies"] for rank in ranks) / first["bytes"]
    for number, rank in enumerate(ranks):
        print(f"rank {number} held after each save: {', '.join(f'{held / MILLION:.0f}' for held in rank['memory'])} MB")
    overhead = max(auto["blocked"] / auto["seconds"] for auto in autos)
    print(f"a step beside a save takes {beside:.3f} s, alone {alone:.3f} s")
    commits, whole, stood = (autos[0][key] for key in ("commits", "seconds", "blocked"))
    print(f"auto: {commits:.0f} commits in {whole:.0f} s, of which training stood still for {stood:.2f} s")
    bars = [
        *(Bar(f"blocked_{kind}_of_background", blocked[kind] / blocked["background"], ">=", 10.0) for kind in BLOCKING),
        Bar("commits_under_auto", commits, ">=", 2),
        Bar("overhead_under_auto", overhead, "<=", 0.035),
        Bar("host_copies_of_the_state", copies, "<=", 1.0),
    ]
    return report("blocked_by_save", rows, bars)


if __name__ == "__main__":
    sys.exit(main())
