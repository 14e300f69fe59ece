"""Publishing, resolving and aliases, on a disk and on a real S3 server."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from raymodels import manifest, storage
from raymodels.errors import IntegrityError, RegistryError
from raymodels.registry import Registry, Version

T = TypeVar("T")


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    """What the registry takes for a model; it never looks into the weights."""
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "more" / "notes.txt").write_text("a file in a folder")
    return str(folder)


@pytest.fixture
def registry(place: str) -> Registry:
    return Registry(place)


@pytest.fixture
def disk(tmp_path: Path) -> Registry:
    return Registry(str(tmp_path / "registry"))


@pytest.fixture
def remote(bucket: str, model_dir: str) -> Version:
    return Registry(f"{bucket}/registry").publish("lm", model_dir, {})


def at_once(count: int, call: Callable[[int], T]) -> list[T]:
    """The results of ``call(0)``, ``call(1)``, ... that begin together."""
    barrier = threading.Barrier(count)

    def run(number: int) -> T:
        barrier.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def test_what_is_published_is_found(registry: Registry, model_dir: str) -> None:
    first = registry.publish("lm", model_dir, {"step": 3})
    second = registry.publish("lm", model_dir, {"step": 4}, alias="prod")
    other = registry.publish("a-2.b_c", model_dir, {})
    assert [v.reference for v in (first, second, other)] == ["lm@1", "lm@2", "a-2.b_c@1"]
    assert first.card["step"] == 3 and first.card["name"] == "lm" and first.card["version"] == 1
    assert registry.names() == ["a-2.b_c", "lm"]
    assert registry.versions() == [other, first, second] and registry.versions("lm") == [first, second]
    assert registry.versions("none") == []
    assert registry.aliases("lm") == {"prod": 2} and registry.aliases("a-2.b_c") == {}
    for reference, version in {"lm": second, "lm@1": first, "lm@prod": second, "registry:lm@1": first}.items():
        assert registry.resolve(reference) == version
    first.verify()
    fetched = Path(first.fetch())
    assert (fetched / "model.safetensors").read_bytes() == b"weights" and (fetched / "more" / "notes.txt").exists()


def test_a_moved_alias_can_be_moved_back(registry: Registry, model_dir: str) -> None:
    for _ in range(2):
        registry.publish("lm", model_dir, {}, alias="prod")
    registry.set_alias("lm", "canary", 2)
    registry.set_alias("lm", "prod", 1, expect=2)
    assert registry.aliases("lm") == {"canary": 2, "prod": 1}
    assert registry.resolve("lm@prod").number == 1


def test_it_is_known_where_an_alias_has_been(registry: Registry, model_dir: str) -> None:
    for _ in range(3):
        registry.publish("lm", model_dir, {})
    for number in (1, 3):
        registry.set_alias("lm", "prod", number)
    assert [registry.has_held("lm", "prod", number) for number in (1, 2, 3)] == [True, False, True]
    assert not registry.has_held("lm", "canary", 1)


def test_an_alias_that_is_elsewhere_is_not_moved(registry: Registry, model_dir: str) -> None:
    for _ in range(2):
        registry.publish("lm", model_dir, {}, alias="prod")
    with pytest.raises(RegistryError, match="lm@prod is 2, not 1: look again"):
        registry.set_alias("lm", "prod", 1, expect=1)
    with pytest.raises(RegistryError, match="lm@new is None, not 1"):
        registry.set_alias("lm", "new", 1, expect=1)
    assert registry.aliases("lm") == {"prod": 2}


def test_publishers_at_once_get_numbers_of_their_own(registry: Registry, model_dir: str) -> None:
    versions = at_once(5, lambda number: registry.publish("lm", model_dir, {"publisher": number}))
    assert sorted(version.number for version in versions) == [1, 2, 3, 4, 5]
    for number, version in enumerate(versions):
        assert registry.resolve(version.reference).card["publisher"] == number
        version.verify()


def test_aliases_moved_at_once_all_hold(registry: Registry, model_dir: str) -> None:
    registry.publish("lm", model_dir, {})
    at_once(6, lambda number: registry.set_alias("lm", f"alias-{number}", 1))
    assert registry.aliases("lm") == {f"alias-{number}": 1 for number in range(6)}


def test_of_movers_who_expect_the_same_one_wins(disk: Registry, model_dir: str) -> None:
    for _ in range(6):
        disk.publish("lm", model_dir, {}, alias="prod")

    def move(number: int) -> bool:
        try:
            disk.set_alias("lm", "prod", number + 1, expect=6)
        except RegistryError:
            return False
        return True

    moved = at_once(5, move)
    assert sum(moved) == 1 and disk.aliases("lm") == {"prod": moved.index(True) + 1}


def test_a_publisher_that_died_leaves_a_number_unused(registry: Registry, model_dir: str) -> None:
    registry.publish("lm", model_dir, {})
    storage.write_bytes(f"{registry.place}/lm/versions/2/claim.json", b"{}")
    storage.write_bytes(f"{registry.place}/lm/versions/2/model/config.json", b"{}")
    assert [version.number for version in registry.versions("lm")] == [1]
    assert registry.resolve("lm").number == 1
    with pytest.raises(RegistryError, match=f"lm has no version 2 in {registry.place}; the newest is 1"):
        registry.resolve("lm@2")
    with pytest.raises(RegistryError, match="lm has no version 2"):
        registry.set_alias("lm", "prod", 2)
    assert registry.publish("lm", model_dir, {}).number == 3


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nobody", "no model 'nobody' in .*; models: lm"),
        ("nobody@3", "no model 'nobody' in .*; models: lm"),
        ("nobody@prod", "no model 'nobody' in .*; models: lm"),
        ("lm@7", "lm has no version 7 in .*; the newest is 1"),
        ("lm@0", "lm has no version 0 in .*; the newest is 1"),
        ("lm@test", "lm has no alias 'test' in .*; aliases: prod"),
        ("lm@", "lm has no alias '' in .*; aliases: prod"),
        ("lm@²", "lm has no alias '²' in .*; aliases: prod"),
        ("../lm", r"'\.\./lm' is not a name: use lower-case letters"),
        ("Big", "'Big' is not a name"),
        ("", "'' is not a name"),
    ],
)
def test_what_is_unknown_is_named_beside_what_there_is(
    disk: Registry, model_dir: str, reference: str, message: str
) -> None:
    disk.publish("lm", model_dir, {}, alias="prod")
    with pytest.raises(RegistryError, match=message):
        disk.resolve(reference)


def test_an_empty_registry_says_so(registry: Registry) -> None:
    assert registry.names() == registry.versions() == []
    with pytest.raises(RegistryError, match=r"no model 'lm' in .*; models: none"):
        registry.resolve("lm")


@pytest.mark.parametrize("alias", ["3", "Prod", "a b", "-x", "²"])
def test_an_unusable_alias_is_refused_before_anything_is_copied(disk: Registry, model_dir: str, alias: str) -> None:
    with pytest.raises(RegistryError, match=f"{alias}.*(would read as a version number|is not a name)"):
        disk.publish("lm", model_dir, {}, alias=alias)
    assert storage.walk(disk.place) == {}
    disk.publish("lm", model_dir, {})
    with pytest.raises(RegistryError, match=r"would read as a version number|is not a name"):
        disk.set_alias("lm", alias, 1)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_no_model_is_refused(disk: Registry, model_dir: str, missing: str) -> None:
    (Path(model_dir) / missing).unlink()
    with pytest.raises(RegistryError, match=r"is not a model: it needs config\.json and \.safetensors files"):
        disk.publish("lm", model_dir, {})
    with pytest.raises(RegistryError, match="none is not a model"):
        disk.publish("lm", f"{model_dir}/none", {})
    assert disk.names() == []


def test_a_changed_byte_is_found_and_named(registry: Registry, model_dir: str) -> None:
    version = registry.publish("lm", model_dir, {})
    file = f"{version.place}/model/model.safetensors"
    storage.write_bytes(file, b"Weights")
    for call in (version.verify, version.fetch):
        with pytest.raises(IntegrityError, match=f"{file} was changed"):
            call()


def test_a_changed_card_is_found(disk: Registry, model_dir: str) -> None:
    version = disk.publish("lm", model_dir, {"step": 1})
    storage.write_json(f"{version.place}/card.json", {**version.card, "step": 9})
    with pytest.raises(IntegrityError, match=r"card\.json was changed"):
        version.verify()


def test_a_local_version_is_fetched_where_it_is(disk: Registry, model_dir: str) -> None:
    version = disk.publish("lm", model_dir, {})
    assert version.fetch() == version.model_place


def test_a_remote_version_is_copied_once(remote: Version, tmp_path: Path) -> None:
    first = Path(remote.fetch())
    assert first.is_relative_to(tmp_path / "cache") and (first / "model.safetensors").read_bytes() == b"weights"
    storage.delete(remote.model_place)
    assert Path(remote.fetch()) == first


@pytest.mark.parametrize("tear", ["no manifest", "missing file", "short file", "changed file"])
def test_a_torn_copy_is_made_anew(remote: Version, tear: str) -> None:
    copy = Path(remote.fetch())
    match tear:
        case "no manifest":
            (copy.parent / manifest.FILE).unlink()
        case "missing file":
            (copy / "config.json").unlink()
        case "short file":
            (copy / "model.safetensors").write_bytes(b"wei")
        case "changed file":
            (copy / "model.safetensors").write_bytes(b"Weights")
    assert Path(remote.fetch()) == copy
    manifest.verify(str(copy.parent))
    assert [path.name for path in copy.parent.parent.iterdir()] == [copy.parent.name]


@pytest.mark.parametrize("torn", [False, True])
def test_fetchers_at_once_share_one_copy(remote: Version, torn: bool) -> None:
    if torn:
        (Path(remote.fetch()) / "config.json").unlink()
    [copy] = set(at_once(4, lambda _: remote.fetch()))
    manifest.verify(str(Path(copy).parent))
    assert len(list(Path(copy).parents[1].iterdir())) == 1


def test_a_registry_that_was_replaced_is_not_served_from_the_cache(remote: Version, tmp_path: Path) -> None:
    old = Path(remote.fetch())
    storage.delete(remote.place)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"others!")
    shutil.rmtree(tmp_path / "model" / "more")
    again = Registry(remote.place.partition("/lm/")[0]).publish("lm", str(tmp_path / "model"), {})
    assert again.number == remote.number
    assert (Path(again.fetch()) / "model.safetensors").read_bytes() == b"others!"
    assert Path(again.fetch()) != old
