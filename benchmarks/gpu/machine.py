"""The device that parts run on, and sizes of models that suit it."""

from __future__ import annotations

import fcntl
import os
import platform
import socket
import struct
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from raymodels.config import Config

# Dense bf16 peaks of the vendors' data sheets, TFLOP/s. The first name that is part of the card's counts.
PEAK_TFLOPS = {
    "B300": 2250.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 311.8,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A6000": 154.8,
    "RTX 6000 Ada": 364.2,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
SEED = 17
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1  # netdevice(7)


@dataclass(frozen=True)
class Size:
    """A Llama's shape, named for its parameters with the 8,192 tokens of these benchmarks."""

    name: str
    hidden_size: int
    layers: int
    heads: int

    def section(self) -> dict[str, Any]:
        return {"arch": "llama", "hidden_size": self.hidden_size, "layers": self.layers, "heads": self.heads}


SMALL, MIDDLE, LARGE = Size("0.12 B", 896, 12, 14), Size("1.2 B", 2048, 24, 16), Size("7 B", 4096, 32, 32)
TINY, LESS_TINY = Size("tiny", 64, 2, 4), Size("less tiny", 96, 3, 4)


@dataclass(frozen=True)
class Machine:
    """Where a part runs: on the card, or with tiny sizes on the CPU. ``folder`` is shared by the parts of one run."""

    cuda: bool
    folder: Path

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda" if self.cuda else "cpu")

    @property
    def vocabulary(self) -> int:
        return 8192 if self.cuda else 512

    def size(self, size: Size) -> Size:
        """The size itself on a card, a tiny one on the CPU."""
        return size if self.cuda else {SMALL: TINY, MIDDLE: LESS_TINY, LARGE: LESS_TINY}[size]

    def synchronize(self) -> None:
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def free_bytes(self) -> int:
        """Free memory of the card, with what torch holds unused."""
        import torch

        if not self.cuda:
            return 1 << 33
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def config(self, name: str, size: Size, seq_len: int, train: dict[str, Any], **sections: Any) -> Config:
        """A run of one worker that saves and evaluates only where ``sections`` say so."""
        from raymodels.config import validate

        library = sysconfig.get_path("stdlib")
        precision = train.pop("precision", "fp32")
        config = validate(
            {
                "run": {"name": name, "storage": str(self.folder / "runs"), "seed": SEED},
                "data": {
                    "source": f"{library}/*.py" if self.cuda else f"{library}/[a-c]*.py",
                    "seq_len": seq_len,
                    "eval_fraction": 0.1,
                    "tokenizer": {"vocab_size": self.vocabulary},
                    "prepared": str(self.folder / "prepared"),
                },
                "model": size.section(),
                "train": {"schedule": "constant", "warmup_steps": 5, "lr": 3e-4, "report_every": 1, **train},
                "workers": {"count": 1, "gpus": int(self.cuda), "cpus": os.cpu_count() if self.cuda else 1},
                "checkpoint": {"every": 10**6},
                "eval": {"every": 10**6, "samples": 4},
                **sections,
            }
        )
        # Set past the check that refuses fp16 on CPUs: some of them compute it, and so the path can be tried there.
        return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})

    def half_precisions(self) -> dict[str, str]:
        """bf16 and fp16 -> why it cannot run here; empty where it can."""
        import torch

        if self.cuda:
            return {"bf16": "" if torch.cuda.is_bf16_supported() else "the card has no bf16", "fp16": ""}
        found = torch.ops.mkldnn._is_mkldnn_fp16_supported()
        return {"bf16": "", "fp16": "" if found else "this CPU does not compute in fp16"}


def join_process_group(machine: Machine) -> None:
    """Make this process the only rank of a process group."""
    import torch
    import torch.distributed as dist

    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    _raise_loopback()
    if machine.cuda:
        torch.cuda.set_device(0)
    else:
        torch.set_num_threads(1)
    store = machine.folder / f"store-{os.getpid()}"
    backend = "nccl" if machine.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)


def _raise_loopback() -> None:
    """Have a network namespace without network, where lo is down, at least talk to itself: gloo wants an interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket, suppress(OSError):
        asked = struct.pack("16sh14x", b"lo", 0)
        _, flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, asked))
        if not flags & IFF_UP:  # root may raise it; for anybody else gloo says what is wrong
            fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


def prepared(config: Config) -> str:
    """The place of the run's prepared data, made once."""
    from raymodels.data.prepare import prepare

    return prepare(config).place


def forget(machine: Machine) -> None:
    """Give back what a model took that nothing refers to any more."""
    import gc

    import torch

    gc.collect()
    if machine.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def card_peak_tflops(name: str) -> float | None:
    """The dense bf16 peak of a card by its name, or none where this table has none."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def description(cuda: bool) -> dict[str, str]:
    """The card, its driver and the versions, for the table's head."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "deepspeed", "triton", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "card": properties.name,
            "card memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "cuda": str(torch.version.cuda),
            "driver": _driver(),
        }
    else:
        found["processor"] = _processor()
    return found


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
