"""The scripts in jobs/, as `ray job submit` calls them, up to where their work begins."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_sigterm_unwinds_as_ctrl_c_does(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "from raymodels.config import Config\n"
        "from raymodels.jobs import main\n"
        "def run(config):\n"
        "    try:\n"
        "        print('running', flush=True)\n"
        "        time.sleep(60)\n"
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
