"""What must not come in by the back door: code from storage, paths that leave their folder, secrets in what is shown.

What each of these guards against stands in docs/security.md.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raymodels import manifest, storage
from raymodels.client import Client
from raymodels.config import Config, HttpConfig, ServeConfig, validate
from raymodels.data.dataset import MANIFEST, open_prepared
from raymodels.errors import ConfigError, IntegrityError, RegistryError
from raymodels.registry import Registry
from raymodels.serve import tenants

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "raymodels").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")])
THROUGH_RAY = {"batch/answerer.py", "batch/job.py", "data/parallel.py"}
"""They pickle what goes from one process of the run to another through Ray, which pickles it anyway."""
OWN_PROCESS = {"serve/sealed.py", "testing.py", "train/failure.py"}
"""They unpickle what they, or their own child processes, have just pickled."""
NEVER = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load"}
NEVER |= {
    "dill.load",
    "dill.loads",
    "joblib.load",
    "cloudpickle.load",
    "cloudpickle.loads",
    "marshal.loads",
    "marshal.load",
}
NEVER |= {"shelve.open", "tarfile.open", "pandas.read_pickle", "zipfile.ZipFile.extractall"}
LOADERS = {"yaml.SafeLoader", "yaml.CSafeLoader", "_Loader"}
"""`_Loader` is made from yaml's safe one."""
AUTO = {"AutoConfig", "AutoTokenizer", "AutoModelForCausalLM", "AutoModel", "AutoProcessor"}


def calls() -> Iterator[tuple[str, str, dict[str, str], list[str]]]:
    """Every call in the code: file, what is called, its keywords and its arguments, as they are written."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                keywords = {keyword.arg or "**": ast.unparse(keyword.value) for keyword in node.keywords}
                where = str(path.relative_to(ROOT)).removeprefix("raymodels/")
                yield where, ast.unparse(node.func), keywords, [ast.unparse(argument) for argument in node.args]


def unsafe(where: str, called: str, keywords: dict[str, str], arguments: list[str]) -> bool:
    """Whether a call may run what it reads, or a shell."""
    if called in NEVER:
        return True
    if called in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
        return where not in THROUGH_RAY | OWN_PROCESS
    if called == "torch.load":
        return keywords.get("weights_only") != "True"
    if called in ("np.load", "numpy.load"):
        return keywords.get("allow_pickle", "False") != "False"
    if called in ("yaml.load", "yaml.load_all"):
        return not LOADERS & {*arguments[1:], *keywords.values()}
    kind, _, method = called.rpartition(".")
    if method == "from_pretrained" and kind in AUTO:
        return keywords.get("trust_remote_code") != "False"  # without it a terminal is asked, and may say yes
    return keywords.get("shell", "False") != "False" or keywords.get("trust_remote_code", "False") != "False"


def test_nothing_is_run_that_comes_from_storage() -> None:
    assert [(where, called) for where, called, *rest in calls() if unsafe(where, called, *rest)] == []


@pytest.mark.parametrize(
    "code",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.loads(data)",
        "np.load(file, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load_all(text, Loader=yaml.UnsafeLoader)",
        "subprocess.run(command, shell=True)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
        "LLM(folder, trust_remote_code=settings.trust)",
        "eval(text)",
    ],
)
def test_the_search_finds_what_it_is_for(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raymodels").mkdir()
    (tmp_path / "raymodels" / "new.py").write_text(f"found = {code}\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "SOURCES", [tmp_path / "raymodels" / "new.py"])
    [(where, called, *rest)] = calls()
    assert unsafe(where, called, *rest)


def test_what_unpickles_still_does() -> None:
    """The exceptions above are no more than there are."""
    assert {where for where, called, *_ in calls() if called == "pickle.loads"} == THROUGH_RAY | OWN_PROCESS


def test_weights_that_are_pickled_are_refused(tmp_path: Path) -> None:
    """Even if somebody puts them where a model starts from: they could be a program."""
    import torch
    from transformers import AutoConfig

    from raymodels.models import build

    class Program:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    shape = AutoConfig.for_model(
        "llama", vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    shape.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Program()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"safetensors"):
        build.load(str(tmp_path), shape, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_a_models_own_code_is_not_run(tmp_path: Path) -> None:
    from raymodels.config import ModelConfig
    from raymodels.models import build

    (tmp_path / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    config = {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelConfig.model_validate({"from": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"model\.from"):
        build.architecture(model, vocab_size=8, seq_len=8, eos_id=0)
    assert not (tmp_path / "ran").exists()


OUTSIDE = ["../secret", "model/../../secret", "/etc/passwd", "..", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    manifest.commit(str(tmp_path), {name: manifest.entry(b"x")})
    with pytest.raises(IntegrityError, match="not in its folder"):
        manifest.read(str(tmp_path))


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_a_version_from_a_bucket_writes_nowhere_but_in_its_cache(bucket: str, tmp_path: Path, name: str) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    version = Registry(bucket).publish("lm", str(model), {})
    entries = manifest.read(version.place)
    storage.write_bytes(storage.join(bucket, "secret"), b"x")
    manifest.commit(version.place, entries | {name: manifest.entry(b"x")})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(IntegrityError, match="not in its folder"):
        version.fetch()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("where", ["shard", "tokenizer", "fingerprint"])
def test_a_dataset_names_files_of_its_own_folder_only(place: str, name: str, where: str) -> None:
    said = {
        "format": 1,
        "fingerprint": name if where == "fingerprint" else "f" * 64,
        "splits": {"train": {"shards": [{"file": name if where == "shard" else "train-0.bin"}]}},
        "tokenizer": {"files": {name if where == "tokenizer" else "tokenizer.json": hashlib.sha256(b"x").hexdigest()}},
    }
    storage.write_json(storage.join(place, MANIFEST), said)
    with pytest.raises(IntegrityError, match="not in its folder"):
        open_prepared(place)


@pytest.mark.parametrize("name", ["../lm", "a/b", "/lm", "..", "registry:../lm", "lm/../../x@1", "LM", "", "a\0b"])
def test_names_of_models_are_no_paths(tmp_path: Path, name: str) -> None:
    registry = Registry(str(tmp_path))
    with pytest.raises(RegistryError, match="is not a name"):
        registry.resolve(name)
    with pytest.raises(RegistryError, match="is not a name"):
        registry.publish(name, str(tmp_path), {})
    if name != "registry:../lm":
        with pytest.raises(RegistryError):
            registry.set_alias("lm", name, 1)


@pytest.mark.parametrize("name", ["../run", "a/b", "/run", ".."])
def test_names_of_runs_are_no_paths(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name"):
        validate({"run": {"name": name}}, Config)


def test_every_server_listens_on_this_host_alone_unless_told() -> None:
    assert HttpConfig().host == "127.0.0.1"
    shown = validate({"models": [{"model": "m"}]}, ServeConfig)
    assert shown.http.host == "127.0.0.1"
    for path in sorted((ROOT / "jobs" / "configs").glob("*.yaml")):
        config = yaml.safe_load(path.read_text("utf-8"))
        assert config.get("http", {}).get("host", "127.0.0.1") == "127.0.0.1", path


def test_keys_are_in_no_repr_no_log_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = str(tmp_path / "keys.yaml")
    key = tenants.add_key(file, "alice")
    with Client("http://127.0.0.1:1", key, retries=0) as client:
        shown = [repr(client), str(client), repr(client._http), repr(client._http.headers)]
        with pytest.raises(Exception, match="cannot connect") as refused:
            client.models()
    found = tenants.Tenants(file)
    shown += [repr(found), repr(found.of(f"Bearer {key}")), Path(file).read_text(), repr(refused.value), caplog.text]
    for wrong in (f"Bearer {key}x", f"Basic {key}", key):
        with pytest.raises(Exception, match="API key") as unknown:
            found.of(wrong)
        shown.append(repr(unknown.value) + str(getattr(unknown.value, "problem", "")))
    assert not [text for text in shown if key in text]


def test_a_keys_file_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    tenants.add_key(str(file), "alice")
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_key_put_in_the_place_of_its_hash_is_not_shown(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("tenants: [{name: alice, keys: [rm-secret]}]")
    with pytest.raises(ConfigError, match="sha256") as wrong:
        tenants.Tenants(str(file))
    assert "rm-secret" not in str(wrong.value)


def test_no_command_takes_a_key_or_a_token_as_an_argument() -> None:
    """All users of a machine see its command lines."""
    code = (
        "import json, typer.main; from raymodels.cli import app; found = []\n"
        "def walk(c):\n"
        "    found.extend(o for p in c.params for o in getattr(p, 'opts', []))\n"
        "    [walk(s) for s in getattr(c, 'commands', {}).values()]\n"
        "walk(typer.main.get_command(app)); print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    secret = [option for option in json.loads(done.stdout) if {"key", "token", "password", "secret"} & words(option)]
    # The key of `keys revoke` is the beginning of a hash.
    assert sorted(set(secret)) == ["--api-key-file", "--key"]


def words(option: str) -> set[str]:
    return set(option.strip("-").split("-"))


def documents(folder: str) -> Iterator[tuple[Path, dict[str, object]]]:
    for path in sorted((ROOT / folder).rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text("utf-8")):
            if isinstance(document, dict):
                yield path, document


def clusters(node: object) -> Iterator[dict[str, object]]:
    """Every RayCluster's spec in a manifest, however deep."""
    if isinstance(node, dict):
        if "headGroupSpec" in node:
            yield node
        for value in node.values():
            yield from clusters(value)


def test_ray_asks_for_a_token_in_everything_shipped() -> None:
    specs = [(path, spec) for path, document in documents("k8s/base") for spec in clusters(document)]
    assert specs
    for path, spec in specs:
        assert spec.get("authOptions", {}).get("mode") == "token", path  # type: ignore[attr-defined]
    launchers = list(documents("cluster"))
    assert launchers
    for path, document in launchers:
        text = json.dumps(document)
        starts = [line for line in text.split('", "') if "ray start" in line]
        assert starts, path
        assert "RAY_AUTH_MODE=token" in text or '"RAY_AUTH_MODE": "token"' in text, path


def test_no_dashboard_is_public() -> None:
    for path, document in documents("k8s"):
        spec = document.get("spec")
        if document.get("kind") == "Service" and isinstance(spec, dict):
            assert spec.get("type", "ClusterIP") == "ClusterIP", path
        if document.get("kind") == "Ingress":
            assert "8265" not in json.dumps(document) and "dashboard" not in json.dumps(spec), path
    for path, document in documents("cluster"):
        assert "--dashboard-host=0.0.0.0" not in json.dumps(document), path
