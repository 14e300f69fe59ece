"""The command `raymodels`: what it prints where, and what it exits with."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import yaml

from raymodels.cli import app, cluster, jobs, keys, main, models, runs
from raymodels.config import validate
from raymodels.registry import Registry

ROOT = Path(__file__).parents[2]
DEMO = str(ROOT / "jobs/configs/demo.yaml")
# What each command's help must speak of.
HELP = {
    "": "raymodels train jobs/configs/demo.yaml",
    "prepare": "prepared dataset",
    "train": "--dry-run",
    "evaluate": "held-out loss",
    "export": "Hugging Face",
    "serve": "HTTP endpoint",
    "batch": "--concurrency",
    "complete": "--max-tokens",
    "chat": "--system",
    "submit": "--address",
    "status": "how it ended",
    "logs": "Until the job ends",
    "stop": "commits its last step",
    "list": "newest first",
    "cluster": "`ray up`",
    "cluster check": "by Ray's own rules",
    "plan": "ZeRO stage",
    "doctor": "remedy",
    "models": "registry",
    "models list": "aliases",
    "models show": "NAME@3",
    "models tag": "compare-and-swap",
    "models publish": "newest checkpoint",
    "runs": "where its time went",
    "runs list": "goodput",
    "runs show": "timeline",
    "runs compare": "losses",
    "keys": "API keys",
    "keys add": "its hash alone",
    "keys list": "limits",
    "keys revoke": "refuse them",
}


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs the command in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["raymodels", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Done(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Two versions of one model; the first is ``prod``."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    found = Registry(str(tmp_path / "registry"))
    found.publish("lm", str(folder), {"run": "demo", "step": 100, "metrics": {"eval_loss": 2.5}}, alias="prod")
    found.publish("lm", str(folder), {"run": "demo", "step": 200})
    return found


@pytest.mark.parametrize("command", HELP)
def test_help_teaches(call: Call, command: str) -> None:
    done = call(*command.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert HELP[command] in " ".join(done.stdout.replace("│", " ").split())


def test_every_command_has_its_help_looked_at() -> None:
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {command.name or "" for command in jobs.registered_commands}
    for name, group in {"models": models, "runs": runs, "keys": keys, "cluster": cluster}.items():
        commands |= {"", name} | {f"{name} {command.name}" for command in group.registered_commands}
    assert commands == set(HELP)


def test_a_dry_run_prints_the_config_and_deepspeeds(call: Call) -> None:
    done = call("train", DEMO, "--dry-run", "--set", "train.lr=5e-4")
    assert (done.returncode, done.stderr) == (0, "")
    ours, _, theirs = done.stdout.partition("# What DeepSpeed is given\n")
    assert validate(yaml.safe_load(ours)).train.lr == 5e-4
    assert json.loads(theirs)["optimizer"]["params"]["lr"] == 5e-4


def test_a_dry_run_in_json(call: Call) -> None:
    printed = json.loads(call("train", DEMO, "--dry-run", "--json").stdout)
    assert validate(printed["config"]).run.name == "python-demo"
    assert printed["deepspeed"]["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", DEMO, "--dry-run", "--set", "train.stepz=3"], 2, "train.stepz: unknown key; did you mean steps?"),
        (["train", DEMO, "--dry-run", "--set", "train.lr"], 2, "--set train.lr: write it as section.key=value"),
        (["train", DEMO, "--dry-run", "--set", "a=["], 2, "--set a=[: while parsing"),
        (["train", DEMO, "--dry-run", "--set", "zero.raw.fp16={}"], 2, "zero.raw.fp16: say it with train.precision"),
        (["train", "none.yaml"], 2, "cannot read config none.yaml"),
        (["serve", DEMO], 2, "unknown key"),
        (["models", "list", "--registry", "nonsense://x"], 2, "cannot open nonsense://x"),
        (["models", "show", "lm", "--registry", "nowhere"], 2, "no model 'lm' in nowhere; models: none"),
        (["models", "publish", DEMO, "--set", "publish=null"], 2, "publish: missing; give publish.name"),
        (["models", "publish", DEMO, "--name", "lm"], 2, "are an adapter's; a config says it in publish"),
        (
            ["models", "publish", "tests", "--name", "lm"],
            2,
            "tests is a folder, so an adapter's: give --name and --base",
        ),
        (["models", "publish", "tests", "--name", "a", "--base", "lm", "--registry", "nowhere"], 2, "no model 'lm'"),
        (["export", "nowhere", "target"], 2, "nowhere"),
        (["complete", "Hi", "--url", "http://127.0.0.1:1"], 1, "cannot connect to http://127.0.0.1:1"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_an_error_is_one_line_and_a_code(call: Call, arguments: list[str], code: int, message: str) -> None:
    done = call(*arguments)
    assert done.returncode == code and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing argument 'config'"),
        (["train", DEMO, "--colour"], "No such option"),
        (["models", "tag", "lm"], "Missing argument 'alias'"),
        (["submit", DEMO, "--job", "dance"], "'train', 'serve', 'evaluate', 'prepare'"),
    ],
)
def test_a_wrong_call_is_explained(call: Call, arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "Try 'raymodels" in done.stderr and "Traceback" not in done.stderr


def test_models(call: Call, registry: Registry) -> None:
    place = ["--registry", registry.place]
    assert call("models", "list", *place).stdout.splitlines() == [
        "lm@1\tprod\tdemo\t100\t2.5",
        "lm@2\t\tdemo\t200\t-",
    ]
    rows = json.loads(call("models", "list", "--json", *place).stdout)
    assert [(row["version"], row["aliases"], row["held-out loss"]) for row in rows] == [
        ("lm@1", "prod", 2.5),
        ("lm@2", "", None),
    ]
    card = json.loads(call("models", "show", "lm@prod", "--verify", *place).stdout)
    assert card["step"] == 100 and card["place"].endswith("/lm/versions/1")
    assert call("models", "tag", "lm", "prod", "--expect", "1", *place).stdout == "lm@prod -> lm@2\n"
    assert registry.aliases("lm") == {"prod": 2}
    late = call("models", "tag", "lm@1", "prod", "--expect", "1", *place)
    assert (late.returncode, late.stderr) == (2, "error: lm@prod is 2, not 1: look again\n")


def test_an_empty_registry_lists_nothing(call: Call, tmp_path: Path) -> None:
    done = call("models", "list", "--registry", str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert call("models", "list", "--json", "--registry", str(tmp_path)).stdout == "[]\n"


def test_a_changed_version_is_found(call: Call, registry: Registry) -> None:
    weights = Path(registry.resolve("lm@1").model_place) / "model.safetensors"
    weights.write_bytes(b"Weights")
    done = call("models", "show", "lm@1", "--verify", "--registry", registry.place)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {weights} was changed")


def test_the_doctor_fails_where_something_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = call("doctor", "--json")
    [compiler] = [row for row in json.loads(done.stdout) if row["check"] == "compiler"]
    assert done.returncode == 1 and compiler == {
        "check": "compiler",
        "ok": False,
        "detail": "none",
        "remedy": "DeepSpeed compiles its operators: install g++",
    }


def test_a_shell_sees_the_code_and_one_line() -> None:
    command = [sys.executable, "-c", "from raymodels.cli import main; main()", "train", "none.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_sigterm_unwinds_as_ctrl_c_does() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = [sys.executable, "-c", "from raymodels.cli import main; main()", "complete", "x", "--url", url]
        with subprocess.Popen(command) as process, silent.accept()[0] as connection:
            assert connection.recv(1)
            # In the microseconds between CPython's look at its signals and poll(2), a signal is noted but wakes nobody.
            while psutil.Process(process.pid).status() != psutil.STATUS_SLEEPING:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 130
