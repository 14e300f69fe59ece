"""What submit sends of a working tree, what it refuses before it sends anything, and what it asks Ray for."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from raymodels.errors import ClusterError, ConfigError
from raymodels.submit import JobState, Submission, pack, submit
from raymodels.submit.connect import find_address, find_token, goes_in_clear
from raymodels.submit.job import environment
from raymodels.submit.pack import EXCLUDES, MOST_BYTES, tree_files

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs/configs/demo.yaml"


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def test_what_is_sent(tmp_path: Path) -> None:
    kept = ["jobs/train.py", "jobs/runs/x", ".github/x", "a/b/c", "a/skip/kept", "link/d"]
    left = [".git/HEAD", ".venv/python", "a/__pycache__/x.pyc", ".mypy_cache/x", "runs/x", "benchmarks/results/x.json"]
    left += ["a/data.bin", "a/b/data.bin", "a/skip/secret", "a/weights/x"]
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    write(root, **dict.fromkeys([name for name in kept + left if not name.startswith("link/")], "x"))
    write(outside, d="x")
    write(root, **{".gitignore": "*.bin\n# secret\n", "a/.rayignore": "/weights/\nskip/*\n!skip/kept\n"})
    (root / "link").symlink_to(outside)
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "nowhere").symlink_to("nothing")
    assert sorted(tree_files(root)) == sorted([*kept, ".gitignore", "a/.rayignore"])


def test_links_are_followed_as_often_as_they_are_there(tmp_path: Path) -> None:
    write(tmp_path, **{"a/file": "x", "b/own": "x"})
    (tmp_path / "b/data").symlink_to("../a")
    (tmp_path / "a/up").symlink_to("..")
    (tmp_path / "a/over").symlink_to("../b")
    assert set(tree_files(tmp_path)) == {"a/file", "a/over/own", "b/own", "b/data/file"}


def test_what_is_ignored_is_what_git_ignores(tmp_path: Path) -> None:
    write(tmp_path, **{".gitignore": "*.log\n", "a.log": "x", "c/.gitignore": "!keep.log", "c/keep.log": "x"})
    write(tmp_path, **{"c/b.log": "x", ".rayignore": "!a.log\n/c/big", "c/big": "x"})
    assert set(tree_files(tmp_path)) == {".gitignore", ".rayignore", "a.log", "c/.gitignore", "c/keep.log"}


def test_a_folder_that_is_kept_keeps_no_secrets(tmp_path: Path) -> None:
    write(tmp_path, **{".gitignore": ".env\n*.pem", ".rayignore": "/*\n!/src/", "src/.env": "x", "src/k.pem": "x"})
    write(tmp_path, **{"src/a.py": "x", "src/deep/.gitignore": "!*/", "src/deep/er/.env": "x", "src/deep/er/b.py": "x"})
    assert set(tree_files(tmp_path)) == {"src/a.py", "src/deep/.gitignore", "src/deep/er/b.py"}


def test_no_rule_brings_histories_back(tmp_path: Path) -> None:
    write(tmp_path, **{".gitignore": "/*\n!/a/\n!/.git/\n!/runs/", ".git/config": "x", "runs/x": "x", "b": "x"})
    write(tmp_path, **{"a/.gitignore": "!*", "a/__pycache__/c.pyc": "x", "a/d": "x"})
    assert set(tree_files(tmp_path)) == {"a/.gitignore", "a/d"}


def test_what_the_job_needs_is_not_ignored(tmp_path: Path) -> None:
    write(tmp_path, **{".rayignore": "configs", "jobs/train.py": "x", "jobs/configs/a.yaml": "x"})
    with pytest.raises(ConfigError, match=r"^jobs/configs/a.yaml: ignored in .*\.rayignore"):
        pack.pack(tmp_path, tmp_path / "tree.zip", needed=["jobs/train.py", "jobs/configs/a.yaml"])


def test_the_same_files_are_the_same_archive(tmp_path: Path) -> None:
    archives = []
    for number in range(2):
        root = tmp_path / str(number)
        names = ["b", "a/c", "run.sh"] if number else ["run.sh", "a/c", "b"]
        write(root, **dict.fromkeys(names, "text"))
        (root / "run.sh").chmod(0o755)
        os.utime(root / "b", (number, number + 1e9))
        pack.pack(root, tmp_path / f"{number}.zip")
        archives.append((tmp_path / f"{number}.zip").read_bytes())
    assert archives[0] == archives[1]
    with zipfile.ZipFile(tmp_path / "0.zip") as archive:
        assert archive.read("a/c") == b"text"
        assert archive.getinfo("run.sh").external_attr >> 16 == 0o755


def test_a_tree_that_is_too_large_is_refused_with_its_biggest_files(tmp_path: Path) -> None:
    write(tmp_path, **{"jobs/train.py": "", "data/small": "x", "config.yaml": DEMO.read_text()})
    for name, mib in (("data/big", 60), ("model.bin", 40)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(mib * 2**20)
    with pytest.raises(
        ConfigError, match=r"100\.0 MiB to send in 5 files.*: data/big \(60.0 MiB\), model.bin \(40.0"
    ) as e:
        submit(tmp_path / "config.yaml", address="http://127.0.0.1:1", working_dir=tmp_path)
    assert ".rayignore" in str(e.value)
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert pack.pack(tmp_path, tmp_path / "tree.zip") < MOST_BYTES


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path, a="")
    (tmp_path / ".gitignore").symlink_to("/proc/self/mem")  # even root cannot read its beginning
    with pytest.raises(ConfigError, match=r"cannot read .*, which is to be sent: name it in \.rayignore"):
        pack.pack(tmp_path, tmp_path / "tree.zip")


def test_the_limit_is_the_dashboards() -> None:
    constants = pytest.importorskip("ray._private.ray_constants")
    assert constants.DASHBOARD_CLIENT_MAX_SIZE == MOST_BYTES


def test_this_checkout_is_small_and_has_no_history() -> None:
    names = list(tree_files(ROOT))
    assert {"raymodels/cli.py", "jobs/train.py", "jobs/configs/demo.yaml"} <= set(names)
    assert not [name for name in names if name.startswith((".git/", ".venv/", "runs/", "prepared/"))]
    assert sum((ROOT / name).stat().st_size for name in names) < MOST_BYTES / 4
    assert ".git" in EXCLUDES


@pytest.mark.slow
def test_the_lock_becomes_an_environment_that_ray_keeps() -> None:
    runtime_env = pytest.importorskip("ray.runtime_env")
    parsed = runtime_env.RuntimeEnv(**environment(Submission(lock=ROOT / "requirements.lock")))
    again = runtime_env.RuntimeEnv(**environment(Submission(lock=ROOT / "requirements.lock")))
    assert "torch==2.13.0" in parsed.uv_config()["packages"]
    assert "--no-cache" not in parsed.uv_config()["uv_pip_install_options"]
    assert parsed.uv_uri() == again.uv_uri(), "or it would be installed for every job"
    assert "uv" not in environment(Submission())


def test_a_lock_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lock: cannot read .*nothing"):
        environment(Submission(lock=tmp_path / "nothing"))
    (tmp_path / "empty").write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="names no package"):
        environment(Submission(lock=tmp_path / "empty"))


def test_only_what_is_asked_for_is_reserved() -> None:
    assert Submission().entrypoint_options() == {}
    asked = Submission(cpus=0.5, gpus=1, memory=8, resources={"head": 0.001})
    assert asked.entrypoint_options() == {
        "entrypoint_num_cpus": 0.5,
        "entrypoint_num_gpus": 1,
        "entrypoint_memory": 8,
        "entrypoint_resources": {"head": 0.001},
    }


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
@pytest.mark.parametrize("value", ["10.0.0.1:6379", "auto", "ray://10.0.0.1:10001", "user:hunter2@10.0.0.1:6379"])
def test_an_environment_that_names_no_dashboard(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"{variable} is not .* RAY_API_SERVER_ADDRESS=http://") as caught:
        find_address(None)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://10.0.0.1:8265/")
    assert find_address(None) == "http://10.0.0.1:8265"


def test_an_address_of_another_kind() -> None:
    with pytest.raises(ConfigError, match=r"http://HOST:8265"):
        find_address("ray://10.0.0.1:10001")
    assert find_address("ray.example.com:8265") == "http://ray.example.com:8265"


def test_why_a_job_ended() -> None:
    def cause(message: str) -> str:
        return JobState("x", "FAILED", "python x.py", message, None, None, None).cause

    assert cause("") == ""
    assert cause("Job supervisor actor died.") == "Job supervisor actor died."
    traceback = "runtime_env setup failed: Failed to set up.\nTraceback:\n  File\nno such package: torhc==2\n\n"
    assert cause(traceback) == "runtime_env setup failed: Failed to set up. ... no such package: torhc==2"


def test_an_address_with_a_password_is_refused_unshown() -> None:
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH") as caught:
        find_address("https://user:hunter2@ray.example.com")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "address, clear",
    [
        ("http://127.0.0.1:8265", False),
        ("http://localhost:8265", False),
        ("https://ray.example.com", False),
        ("http://ray.example.com:8265", True),
    ],
)
def test_a_token_in_clear_text_is_noticed(address: str, clear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not goes_in_clear(address), "there is no token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert goes_in_clear(address) == clear
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert find_token() is None


def test_a_token_file_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/nothing")
    with pytest.raises(ClusterError, match="RAY_AUTH_TOKEN_PATH"):
        find_token()


def test_a_missing_ca(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match=r"--ca: there is no .*ca.pem"):
        submit(DEMO, address="https://127.0.0.1:1", ca=tmp_path / "ca.pem", working_dir=ROOT)
