"""The scripts in jobs/, as `ray job submit` calls them, up to where their work begins; prepare to its end."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raymodels.config import to_yaml
from tests.conftest import altered

ROOT = Path(__file__).parents[2]
JOBS = [ROOT / "jobs" / f"{name}.py" for name in ("evaluate", "prepare", "serve", "train")]


def config_for(job: Path) -> str:
    return str(ROOT / "jobs/configs" / ("serve.yaml" if job.stem == "serve" else "demo.yaml"))


def call(job: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(job), *arguments], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_help_teaches(job: Path) -> None:
    done = call(job, "--help")
    assert done.returncode == 0
    assert "--set a.b=c" in done.stdout


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.stem)
def test_a_wrong_setting_is_one_line_and_exit_code_2(job: Path) -> None:
    section = "http" if job.stem == "serve" else "data"
    done = call(job, config_for(job), "--set", f"{section}.colour=red")
    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: {section}.colour: unknown key")


@pytest.mark.slow
def test_a_dataset_is_prepared_once(tiny: dict[str, Any], tmp_path: Path) -> None:
    config, prepare = tmp_path / "tiny.yaml", ROOT / "jobs/prepare.py"
    config.write_text(to_yaml(altered(tiny, data={"prepared": str(tmp_path)})))
    first, again = (call(prepare, str(config)) for _ in range(2))
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    [place] = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert first.stdout == f"prepared: {place} (new)\n"
    assert again.stdout == f"prepared: {place} (found there)\n"


def test_sigterm_unwinds_as_ctrl_c_does(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "from raymodels.config import Config\n"
        "from raymodels.jobs import main\n"
        "def run(config):\n"
        "    try:\n"
        "        print('running', flush=True)\n"
        "        while True:\n"
        "            time.sleep(0.01)\n"
        "    finally:\n"
        "        print('closed', flush=True)\n"
        "sys.exit(main(run, Config, None))\n"
    )
    command = [sys.executable, str(script), str(ROOT / "jobs/configs/demo.yaml")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "closed\n"
    assert process.returncode == 130
