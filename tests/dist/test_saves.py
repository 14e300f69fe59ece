"""Saves in the background on storage that fails, fills up, goes away and comes back, and ranks that die on the way."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from raymodels import manifest, storage
from raymodels.checkpoint import layout, shards
from raymodels.config import Config
from raymodels.errors import StorageError
from raymodels.testing import run_ranks, train_here
from tests.conftest import altered

WORKERS = 2
Reports = list[dict[str, Any]]


def reports(config: Config, prepared: str, until: int | None = None) -> Reports:
    return train_here(config, prepared, until)[1]


def saves(of: Reports) -> dict[int, str | None]:
    """The step of every save that was reported, and its error."""
    return {save["step"]: save["error"] for report in of for save in report["saves"]}


def steps(config: Config) -> list[int]:
    return [checkpoint.step for checkpoint in layout.committed(config.place)]


def verified(config: Config) -> list[int]:
    """The committed steps, every file of them compared with its checksum."""
    for checkpoint in layout.committed(config.place):
        manifest.verify(checkpoint.place)
    return steps(config)


class Server:
    """A real S3 server on one port, that can go away and come back with what it holds."""

    def __init__(self) -> None:
        self.bucket = f"saves-{uuid.uuid4().hex}"  # what moto holds outlives its servers
        from moto.server import ThreadedMotoServer

        self._make = lambda port: ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self._server = self._make(0)
        self._server.start()
        _, self.port = self._server.get_host_and_port()

    def stop(self) -> None:
        self._server.stop()
        self._server._server.server_close()  # so that whoever connects is refused, rather than left waiting

    def start(self) -> None:
        self._server = self._make(self.port)
        self._server.start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    import s3fs

    server = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(server.bucket)
    yield server
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def environment(server: Server) -> dict[str, str]:
    """What ranks need to know; the server that they are forked from was started before."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {"AWS_MAX_ATTEMPTS": "1"}


def with_pauses(config: Config, prepared: str, variables: dict[str, str], folder: str, at: list[int]) -> Reports | str:
    """Train; before each step of ``at``, when no save is under way, say so in ``folder`` and wait to be let go."""
    from raymodels.train import loop

    os.environ |= variables
    take_step = loop.optimizer_step

    def stepping(session: loop.Session, step: int, *rest: Any) -> loop.Taken:
        if step in at:
            session.saver.wait()
            Path(folder, f"at-{step}-{os.environ['RANK']}").touch()
            wait_for(Path(folder, f"go-{step}"))
        return take_step(session, step, *rest)

    loop.optimizer_step = stepping
    try:
        return reports(config, prepared)
    except StorageError as error:
        return f"StorageError: {error}"


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def interfering(folder: Path, step: int, action: Callable[[], None]) -> threading.Thread:
    """A thread that acts while the ranks pause before a step, and lets them go."""

    def act() -> None:
        for rank in range(WORKERS):
            wait_for(folder / f"at-{step}-{rank}")
        action()
        (folder / f"go-{step}").touch()

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def on_s3(server: Server, tiny: dict[str, Any], **settings: dict[str, Any]) -> Config:
    on_it = {**tiny, "run": {**tiny["run"], "storage": f"s3://{server.bucket}/runs"}}
    return altered(on_it, None, train={"steps": 6}, **settings)


def test_saves_to_s3_and_resumes_there_on_another_number_of_workers(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, server: Server
) -> None:
    undisturbed = run_ranks(reports, WORKERS, altered(tiny, tmp_path, train={"steps": 6}), prepared)[0]
    config, variables = on_s3(server, tiny), environment(server)
    before = run_ranks(with_environment, WORKERS, config, prepared, variables, 5)[0]
    assert verified(config) == [2, 4]
    after = run_ranks(with_environment, 1, config.model_copy(update={"workers": one(config)}), prepared, variables)[0]
    assert verified(config) == [4, 6]
    assert [report["step"] for report in after] == [5, 6]
    resumed = [report["loss"] for report in before[:4] + after]
    assert resumed == pytest.approx([report["loss"] for report in undisturbed], rel=1e-6)


def with_environment(config: Config, prepared: str, variables: dict[str, str], until: int | None = None) -> Reports:
    os.environ |= variables
    return reports(config, prepared, until)


def one(config: Config) -> Any:
    return config.workers.model_copy(update={"count": 1})


def comes_back(server: Server, gone: Path) -> None:
    wait_for(gone)
    time.sleep(6)
    server.start()


def test_storage_that_goes_and_comes_back_is_tried_again(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, server: Server
) -> None:
    config = on_s3(server, tiny, checkpoint={"every": 2, "keep": 3, "retry_s": 60})
    interfering(tmp_path, 3, server.stop)
    threading.Thread(target=comes_back, args=(server, tmp_path / "go-3"), daemon=True).start()
    found = run_ranks(with_pauses, WORKERS, config, prepared, environment(server), str(tmp_path), [3])[0]
    assert saves(found) == {2: None, 4: None, 6: None}
    assert max(save["seconds"] for report in found for save in report["saves"]) > 2
    assert verified(config) == [2, 4, 6]


def test_a_save_that_storage_refuses_is_reported_and_training_goes_on(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, server: Server
) -> None:
    config = on_s3(server, tiny, checkpoint={"every": 2, "keep": 3, "retry_s": 0})
    interfering(tmp_path, 3, server.stop)
    interfering(tmp_path, 5, server.start)
    found = run_ranks(with_pauses, WORKERS, config, prepared, environment(server), str(tmp_path), [3, 5])[0]
    errors = saves(found)
    assert {step: error is None for step, error in errors.items()} == {2: True, 4: False, 6: True}
    assert f"cannot write {config.place}/checkpoints/step-00000004" in (errors[4] or "")
    assert verified(config) == [2, 6]


def test_an_end_without_its_save_is_an_error(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, server: Server
) -> None:
    config = on_s3(server, tiny, checkpoint={"every": 2, "keep": 3, "retry_s": 1})
    interfering(tmp_path, 5, server.stop)
    for answer in run_ranks(with_pauses, WORKERS, config, prepared, environment(server), str(tmp_path), [5]):
        assert isinstance(answer, str)
        assert answer.startswith("StorageError: the last checkpoint was not saved: rank ")
    server.start()
    assert verified(config) == [2, 4]


def known_to_us(config: Config, prepared: str) -> Reports:
    secrets.token_hex = lambda _=None: "known"
    return reports(config, prepared)


@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_full_disk_costs_that_save_alone(tiny: dict[str, Any], prepared: str, tmp_path: Path, rank: int) -> None:
    config = altered(tiny, tmp_path, train={"steps": 6}, checkpoint={"keep": 3, "retry_s": 0})
    shard = Path(layout.step_place(config.place, 4), shards.file_name(rank, WORKERS, "known"))
    shard.parent.mkdir(parents=True)
    shard.symlink_to("/dev/full")
    found = run_ranks(known_to_us, WORKERS, config, prepared)
    for each in found:
        errors = saves(each)
        assert [step for step, error in errors.items() if error] == [4]
        assert f"rank {rank}: cannot write {shard}: [Errno 28] No space left on device" in (errors[4] or "")
    assert verified(config) == [2, 6]
    assert storage.list_names(f"{config.place}/checkpoints") == ["step-00000002", "step-00000006"]


def slow_saves(config: Config, prepared: str) -> tuple[list[tuple[float, float]], list[float], int]:
    """When saves began and ended, when steps ended, and how many host buffers all of them used."""
    from raymodels.checkpoint import tensors
    from raymodels.checkpoint.save import Saver
    from raymodels.train import loop

    spans, ended, buffers = [], [], set()
    write, run_save, take_step = tensors.write, Saver._run_save, loop.optimizer_step

    def slow_write(place: str, flat: dict[str, Any], said: dict[str, Any]) -> Any:
        while len(ended) < min(len(spans) + 2, config.train.steps):  # until the step after this save's has ended
            time.sleep(0.01)
        time.sleep(0.3)
        buffers.update(tensor.data_ptr() for tensor in flat.values())
        return write(place, flat, said)

    def timed(saver: Saver, *given: Any) -> None:
        begin = time.monotonic()
        run_save(saver, *given)
        spans.append((begin, time.monotonic()))

    def stepping(*given: Any) -> loop.Taken:
        taken = take_step(*given)
        ended.append(time.monotonic())
        return taken

    tensors.write, Saver._run_save, loop.optimizer_step = slow_write, timed, stepping  # type: ignore[method-assign]
    train_here(config, prepared)
    return spans, ended, len(buffers)


def test_saves_run_beside_training_one_at_a_time_in_the_same_memory(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    once = altered(tiny, tmp_path / "once", checkpoint={"every": 4})
    often = altered(tiny, tmp_path / "often", checkpoint={"every": 1, "keep": 2})
    buffers = [used for _, _, used in run_ranks(slow_saves, WORKERS, once, prepared)]
    for rank, (spans, steps_ended, used) in enumerate(run_ranks(slow_saves, WORKERS, often, prepared)):
        assert len(spans) == 4
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        beside = [sum(begin < moment < end for moment in steps_ended) for begin, end in spans[:-1]]
        assert beside == [1, 1, 1]  # the step after it; then the next save waits
        assert used == buffers[rank]
    assert verified(often) == [3, 4]


def dying(config: Config, prepared: str, victim: int, moment: str) -> None:
    """Train; in the save of step 4 the victim gets SIGKILL as it comes to that moment."""
    from raymodels.checkpoint.save import Saver

    original = getattr(Saver, moment)
    seen: list[int] = []

    def fatal(saver: Saver, *given: Any) -> Any:
        seen.append(0)
        second_save = len(seen) > (2 if moment == "_exchange" else 1)  # a save has two exchanges
        if second_save and int(os.environ["RANK"]) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(saver, *given)

    setattr(Saver, moment, fatal)
    train_here(config, prepared)


@pytest.mark.parametrize(("victim", "moment"), [(0, "_write"), (0, "_declare"), (2, "_write"), (2, "_exchange")])
def test_a_rank_killed_within_a_save_leaves_the_one_before(
    tiny: dict[str, Any], prepared: str, tmp_path: Path, victim: int, moment: str
) -> None:
    config = altered(tiny, tmp_path, train={"steps": 6}, workers={"count": 3})
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=f"rank {victim}: the process died"):
        run_ranks(dying, 3, config, prepared, victim, moment)
    assert time.monotonic() - begin < 60  # nobody waits for collective_timeout_s, which is half an hour
    assert verified(config) == [2]
    assert layout.sweep(config.place) == [layout.step_place(config.place, 4)]
    assert [report["step"] for report in run_ranks(reports, 3, config, prepared)[0]] == [3, 4, 5, 6]


def synced(config: Config, prepared: str) -> set[int]:
    """The inodes that this rank had synced when it acknowledged its part of the only save, or declared it."""
    from raymodels.checkpoint.save import Saver

    sync, exchange, declare = os.fsync, Saver._exchange, manifest.commit
    inodes: set[int] = set()
    in_time: set[int] = set()

    def recording(descriptor: int) -> None:
        sync(descriptor)
        inodes.add(os.fstat(descriptor).st_ino)

    def acknowledging(saver: Saver, mine: Any) -> Any:
        if mine is not None:
            in_time.update(inodes)
        return exchange(saver, mine)

    def declaring(place: str, entries: manifest.Entries) -> None:
        in_time.update(inodes)
        declare(place, entries)

    os.fsync, Saver._exchange, manifest.commit = recording, acknowledging, declaring  # type: ignore[method-assign,assignment]
    train_here(config, prepared)
    return in_time


def test_all_that_a_manifest_names_has_survived_a_power_cut_before_it_is_there(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path / "new", checkpoint={"every": 4})
    inodes = set().union(*run_ranks(synced, WORKERS, config, prepared))
    place = Path(layout.open_checkpoint(config.place).place)
    needed = [place / name for name in manifest.read(str(place))]
    needed += [place.parent, place, place / layout.ZERO, place / layout.MODEL]  # whose entries name them
    needed += [Path(config.place), tmp_path / "new", tmp_path]
    assert [str(path) for path in needed if path.stat().st_ino not in inodes] == []


def cut_off(config: Config, prepared: str, run: str) -> str:
    """Train as an attempt that was given up in mid-save: its files go to ``run``, and it hears of no other rank."""
    from raymodels.checkpoint.save import Saver

    def silence(*_: Any) -> None:
        raise RuntimeError("nobody answers")

    place = layout.step_place
    layout.step_place = lambda _, step: place(run, step)
    Saver._exchange = silence  # type: ignore[assignment,method-assign]
    with pytest.raises(RuntimeError, match="nobody answers"):
        reports(config, prepared)
    return "written"


def test_an_attempt_that_was_given_up_and_writes_on_spoils_no_checkpoint(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config, given_up = altered(tiny, tmp_path / "run"), altered(tiny, tmp_path / "other", train={"lr": 0.1})
    run_ranks(reports, WORKERS, config, prepared)
    [first, *_] = steps(config)
    zero = Path(layout.step_place(config.place, first), layout.ZERO)
    before = set(zero.iterdir())
    assert run_ranks(cut_off, WORKERS, given_up, prepared, config.place) == ["written"] * WORKERS
    assert verified(config)[0] == first
    assert len(set(zero.iterdir()) - before) == WORKERS


def test_a_manifest_that_is_none_any_more_is_damage_like_any_other(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path)
    run_ranks(reports, WORKERS, config, prepared)
    file = Path(layout.step_place(config.place, 4), manifest.FILE)
    file.write_bytes(b"\xff" + file.read_bytes()[1:])
    resumed = altered(tiny, tmp_path, train={"steps": 4, "micro_batch": 1})
    assert [report["step"] for report in run_ranks(reports_quietly, WORKERS, resumed, prepared)[0]] == [3, 4]
    assert verified(config) == [2, 4]


def reports_quietly(config: Config, prepared: str) -> Reports:
    with pytest.warns(UserWarning, match="is damaged and left out"):
        return reports(config, prepared)


def test_damage_alone_is_refused_at_every_start(tiny: dict[str, Any], prepared: str, tmp_path: Path) -> None:
    config = altered(tiny, tmp_path, checkpoint={"every": 4})
    run_ranks(reports, WORKERS, config, prepared)
    Path(layout.step_place(config.place, 4), layout.STATE).write_bytes(b"{}")
    for _ in range(2):
        layout.sweep(config.place)
        with pytest.raises(AssertionError, match="none of the 1 checkpoints"):
            run_ranks(reports_quietly, WORKERS, config, prepared)
    assert steps(config) == [4]


def asked_twice(config: Config, prepared: str) -> Reports:
    """Train, and be asked to leave for two reasons, of which one says not to save."""
    from raymodels.train import signals

    signals.POLL_SECONDS = 0.001
    signals.request(config.place, 1, "replaced")
    signals.request(config.place, 1, "resized")
    return reports(config, prepared)


def test_who_was_replaced_saves_nothing_whatever_else_is_asked(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, train={"steps": 50}, checkpoint={"every": 1, "keep": 50})
    found = run_ranks(asked_twice, WORKERS, config, prepared)[0]
    assert found[-1]["left"] == "replaced"
    assert steps(config) == [report["step"] for report in found[:-1]]


def on_disks_of_their_own(config: Config, prepared: str) -> Reports:
    """Train on ranks of which each sees what it wrote, as where the storage is a folder that the nodes do not share."""
    from raymodels.checkpoint import tensors

    write, rank = tensors.write, os.environ["RANK"]
    elsewhere = f"{config.run.storage}/disk-{rank}"
    if rank != "0":
        tensors.write = lambda place, *rest: write(storage.join(elsewhere, storage.name(place)), *rest)
    return reports(config, prepared)


def test_a_checkpoint_of_which_each_host_has_a_part_is_not_committed(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, checkpoint={"every": 2, "keep": 3, "retry_s": 0})
    with pytest.raises(AssertionError, match=r"shard-00001-of-00002.* is not to be seen .*run\.storage must be one"):
        run_ranks(on_disks_of_their_own, WORKERS, config, prepared)
    assert steps(config) == []


def late(config: Config, prepared: str) -> Reports:
    """Train; storage refuses rank 1's first write for longer than a collective may take."""
    from raymodels.checkpoint import tensors

    write, asked = tensors.write, list[float]()

    def refused(*given: Any) -> Any:
        asked.append(time.monotonic())
        if os.environ["RANK"] == "1" and asked[-1] < asked[0] + 5:
            raise StorageError("it is away")
        return write(*given)

    tensors.write = refused
    return reports(config, prepared)


def test_a_rank_that_tries_again_may_take_longer_than_a_collective(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(
        tiny,
        tmp_path,
        train={"steps": 2},
        workers={"count": 2, "collective_timeout_s": 2},
        checkpoint={"every": 2, "retry_s": 30},
    )
    assert saves(run_ranks(late, WORKERS, config, prepared)[0]) == {2: None}


def clock_set_back(config: Config, prepared: str) -> Reports:
    now = time.time
    time.time = lambda: now() - 3600 * time.perf_counter()  # further with every look
    return reports(config, prepared)


def test_a_clock_that_is_set_back_puts_off_no_save(tiny: dict[str, Any], prepared: str, tmp_path: Path) -> None:
    config = altered(tiny, tmp_path, workers={"count": 1}, checkpoint={"every": "0.000001s", "keep": 9})
    run_ranks(clock_set_back, 1, config, prepared)
    assert steps(config) == [1, 2, 3, 4]


def held_up(config: Config, prepared: str) -> tuple[int, list[str]]:
    """Train with slow storage: how often the rank said that it goes on while a save held it up; its temporary files."""
    import tempfile

    from raymodels.checkpoint import save, tensors
    from raymodels.train.meter import Phases

    write, said = tensors.write, list[str]()

    def slow(*given: Any) -> Any:
        time.sleep(0.5)
        return write(*given)

    def saying(phases: Phases) -> None:
        said.append(phases._open[-1][0])

    tensors.write, Phases.going_on, save.TICK_S = slow, saying, 0.02  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        reports(config, prepared)
        tempfile.tempdir = None
        return said.count("blocked_by_save"), [path.name for path in Path(folder).iterdir()]


def test_a_rank_that_storage_holds_up_is_no_rank_that_hangs_and_leaves_no_files(
    tiny: dict[str, Any], prepared: str, tmp_path: Path
) -> None:
    config = altered(tiny, tmp_path, workers={"count": 1}, checkpoint={"every": 1, "keep": 2})
    [(said, left)] = run_ranks(held_up, 1, config, prepared)
    assert said > 20
    assert left == []
