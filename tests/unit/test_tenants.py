"""API keys: the file, who a key belongs to, reloading, and the commands that write it."""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY

from raymodels.cli import main
from raymodels.config import KeysConfig, load
from raymodels.errors import ConfigError
from raymodels.serve.schema import Refused
from raymodels.serve.tenants import ANYBODY, Tenants, add_key, hashed, new_key, revoke


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.yaml")


def refused(tenants: Tenants, header: str | None) -> Any:
    with pytest.raises(Refused) as refusal:
        tenants.of(header)
    assert refusal.value.problem.status == 401
    return refusal.value.problem


def failures() -> float:
    return REGISTRY.get_sample_value("raymodels_serve_keys_reload_failures_total") or 0.0


def test_a_key_leads_to_its_tenant_and_only_its_own(file: str) -> None:
    search, chat = add_key(file, "search"), add_key(file, "chat", priority=3, models=["m"])
    tenants = Tenants(file)
    assert tenants.of(f"Bearer {search}").name == "search"
    assert tenants.of(f"bearer  {chat} ").name == "chat"
    assert (tenants.of(f"Bearer {chat}").priority, tenants.of(f"Bearer {chat}").models) == (3, ("m",))
    assert tenants.of(f"Bearer {chat}").allows("m")
    assert not tenants.of(f"Bearer {chat}").allows("other")
    assert tenants.of(f"Bearer {search}").allows("other")


def test_what_is_no_known_key_is_401(file: str) -> None:
    key = add_key(file, "search")
    tenants = Tenants(file)
    for header in (None, "", "Bearer", "Bearer ", key, f"Basic {key}"):
        assert "missing" in refused(tenants, header).message
    for wrong in (new_key(), key[:-1], key + "x", key.upper(), hashed(key), "ÿ\udcff", "x" * 100_000):
        problem = refused(tenants, f"Bearer {wrong}")
        assert problem.code == "invalid_api_key"
        assert wrong not in problem.message


def test_the_table_holds_no_key_and_no_hash_to_look_up_by(file: str) -> None:
    """The order of look-ups depends on a secret of this process, so timing them tells nothing about stored keys."""
    key = add_key(file, "search")
    one, other = Tenants(file), Tenants(file)
    assert one._by_hash.keys().isdisjoint(other._by_hash.keys())
    assert key not in repr(vars(one))


def test_without_a_file_anybody_may_call_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tenants = Tenants(None)
    assert tenants.of(None) is ANYBODY
    assert tenants.of("Bearer anything") is ANYBODY
    assert ANYBODY.allows("any model")
    assert "http.keys_file is not set" in caplog.text


def test_json_is_as_good_as_yaml(tmp_path: Path) -> None:
    key, path = new_key(), tmp_path / "keys.json"
    path.write_text(json.dumps({"tenants": [{"name": "a", "keys": [hashed(key)]}]}))
    assert Tenants(str(path)).of(f"Bearer {key}").name == "a"


GOOD = hashed("x")


@pytest.mark.parametrize(
    ("tenants", "says"),
    [
        ([{"name": "a", "keys": ["secret-value"]}], "tenants.0.keys: must be a list of sha256:"),
        ([{"name": "a", "keys": "secret-value"}], "tenants.0.keys: must be a list"),
        ([{"name": "a", "keys": [GOOD.upper()]}], "tenants.0.keys: must be a list"),
        ([{"name": "a"}], "keys: missing"),
        ([{"name": "a", "keys": [GOOD], "request_per_minute": 1}], "did you mean requests_per_minute"),
        ([{"name": "a", "keys": [GOOD], "concurrency": 0}], "concurrency"),
        ([{"name": "a b", "keys": [GOOD]}], "name"),
        ([{"name": "a", "keys": [GOOD]}, {"name": "a", "keys": [hashed("y")]}], "the name a is there twice"),
        ([{"name": "a", "keys": [GOOD]}, {"name": "b", "keys": [GOOD]}], "is there twice"),
    ],
)
def test_a_wrong_file_is_refused_by_setting_and_never_shows_a_key(file: str, tenants: Any, says: str) -> None:
    Path(file).write_text(yaml.safe_dump({"tenants": tenants}))
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        Tenants(file)
    assert "secret-value" not in str(error.value)


def test_a_missing_file_is_refused(file: str) -> None:
    with pytest.raises(ConfigError, match=r"keys\.yaml"):
        Tenants(file)


def test_a_changed_file_is_read_again(file: str) -> None:
    old = add_key(file, "a")
    tenants = Tenants(file)
    assert not tenants.refresh()
    new = add_key(file, "b", concurrency=2)
    assert tenants.refresh()
    assert not tenants.refresh()
    assert tenants.of(f"Bearer {new}").concurrency == 2
    revoke(file, "a")
    tenants.refresh()
    refused(tenants, f"Bearer {old}")


def test_a_kubernetes_secret_is_swapped_by_a_link(tmp_path: Path) -> None:
    keys = {}
    for version in ("v1", "v2"):
        (tmp_path / version).mkdir()
        keys[version] = add_key(str(tmp_path / version / "keys.yaml"), version)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    tenants = Tenants(str(tmp_path / "keys.yaml"))
    assert tenants.of(f"Bearer {keys['v1']}").name == "v1"
    (tmp_path / "..new").symlink_to("v2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert tenants.refresh()
    assert tenants.of(f"Bearer {keys['v2']}").name == "v2"
    refused(tenants, f"Bearer {keys['v1']}")


@pytest.mark.parametrize("broken", ["tenants: [", "tenants: {}", "", None])
def test_a_broken_file_keeps_the_old_keys_loudly(
    file: str, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(file, "a")
    tenants, before = Tenants(file), failures()
    if broken is None:
        Path(file).unlink()
    else:
        Path(file).write_text(broken)
    assert not tenants.refresh()
    assert not tenants.refresh()  # told once, not every few seconds
    assert tenants.of(f"Bearer {key}").name == "a"
    assert failures() == before + 1
    assert [r.levelno for r in caplog.records if "stay in force" in r.getMessage()] == [logging.ERROR]
    Path(file).unlink(missing_ok=True)
    other = add_key(file, "b")
    assert tenants.refresh()
    assert tenants.of(f"Bearer {other}").name == "b"


def test_the_file_is_watched_in_the_background(file: str) -> None:
    add_key(file, "a")
    tenants = Tenants(file)
    tenants.watch(every_s=0.01)
    key, deadline = add_key(file, "b"), time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            assert tenants.of(f"Bearer {key}").name == "b"
            break
        except Refused:
            time.sleep(0.01)
    else:
        pytest.fail("the new key was not seen")
    tenants.close()


def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["raymodels", "keys", *words])
    with pytest.raises(SystemExit) as done:
        main()
    out, err = capsys.readouterr()
    return int(done.value.code or 0), out, err


def test_the_commands(file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        return command(capsys, monkeypatch, *words)

    code, out, err = run("add", "search", "--file", file, "--model", "m", "--model", "n", "--tokens-per-minute", "9000")
    first = out.strip()
    assert (code, len(out.splitlines())) == (0, 1)
    assert "cannot be shown again" in err
    second = run("add", "search", "--file", file, "--priority", "2")[1].strip()
    tenants = Tenants(file)
    assert tenants.of(f"Bearer {first}") == tenants.of(f"Bearer {second}")
    tenant = tenants.of(f"Bearer {second}")
    assert (tenant.models, tenant.tokens_per_minute, tenant.priority) == (("m", "n"), 9000, 2)
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    assert first not in Path(file).read_text()

    code, out, _ = run("list", "--file", file)
    assert out.split("\t")[:3] == ["search", f"{hashed(first)[:19]},{hashed(second)[:19]}", "m,n"]
    assert json.loads(run("list", "--file", file, "--json")[1])[0]["tokens_per_minute"] == 9000

    metrics = run("add", "prometheus", "--file", file, "--model", "none", "--metrics")[1].strip()
    assert Tenants(file).of(f"Bearer {metrics}").metrics
    assert not Tenants(file).of(f"Bearer {first}").metrics
    shown = dict(line.split("\t", 1) for line in run("list", "--file", file)[1].splitlines())
    assert ("metrics=True" in shown["prometheus"], "metrics" in shown["search"]) == (True, False)
    assert run("revoke", "prometheus", "--file", file)[0] == 0

    assert run("revoke", "search", "--file", file, "--key", hashed(first)[:19])[:2] == (0, "1 key of search revoked\n")
    tenants.refresh()
    refused(tenants, f"Bearer {first}")
    assert tenants.of(f"Bearer {second}").name == "search"
    assert run("revoke", "search", "--file", file)[0] == 0
    assert load(file, root=KeysConfig).tenants == ()

    assert run("revoke", "nobody", "--file", file)[0] == 2
    assert run("add", "bad name", "--file", file)[0] == 2
    assert run("add", "a", "--file", "/no/such/folder/keys.yaml")[0] == 2
    assert run("list", "--file", "/no/such/keys.yaml")[0] == 2


def test_revoking_a_key_that_is_not_there_names_the_remedy(file: str) -> None:
    add_key(file, "a")
    add_key(file, "a")
    for key in ("sha256:", "sha256:0000000000000000", new_key()):
        with pytest.raises(ConfigError, match="raymodels keys list"):
            revoke(file, "a", key)
    assert len(load(file, root=KeysConfig).tenants[0].keys) == 2
