"""A RayService that is applied together with the job which publishes what it serves."""

import threading
import time
from pathlib import Path

import pytest

from raymodels.errors import RegistryError
from raymodels.registry import Registry
from raymodels.serve import deploy

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/model.safetensors").write_bytes(b"weights")
    return str(tmp_path / "model")


def test_a_version_is_waited_for(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deploy, "VERSION_POLL_S", 0.01)
    registry = Registry(str(tmp_path / "registry"))
    job = threading.Timer(0.1, lambda: registry.publish("m", model, {}, alias="prod"))
    job.start()
    version = deploy._published(registry, "m@prod", time.monotonic() + 60)
    job.join()
    assert (version.name, version.number) == ("m", 1)
    assert "waiting for m@prod: " in capsys.readouterr().out


def test_but_no_longer_than_told(tmp_path: Path, model: str) -> None:
    registry = Registry(str(tmp_path / "registry"))
    registry.publish("m", model, {})
    with pytest.raises(RegistryError, match="m has no alias 'prod'"):
        deploy._published(registry, "m@prod", time.monotonic())
