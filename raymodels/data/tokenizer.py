"""Train a byte-level BPE tokenizer, or load one. Either way it becomes files that travel with the dataset."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from raymodels import storage
from raymodels.errors import DataError

END_OF_TEXT = "<|endoftext|>"
DECIDING = ("normalizer", "pre_tokenizer", "model", "added_tokens")  # the parts of tokenizer.json that documents pass


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as the files of a folder that ``AutoTokenizer.from_pretrained`` loads: name -> content."""

    files: dict[str, bytes]
    eos_id: int
    pad_id: int

    @property
    def serialised(self) -> str:
        """What the tokenizers library loads."""
        return self.files["tokenizer.json"].decode()

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return 1 + int(max(encoder(self.serialised).get_vocab().values()))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what decides the token ids of a document; a chat template or a padding side does not."""
        settings = json.loads(self.serialised)
        meaning = [settings[key] for key in DECIDING] + [self.eos_id]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()

    def write(self, place: str) -> None:
        for name, content in self.files.items():
            storage.write_bytes(storage.join(place, name), content)


def train(texts: Iterable[str], vocab_size: int) -> TokenizerFiles:
    """Train a byte-level BPE: the same texts give the same bytes, and every text decodes to itself.

    Small texts may give fewer than ``vocab_size`` tokens. `END_OF_TEXT` is its end, begin and padding token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Written by hand, because importing transformers and with it torch takes longer than a small dataset does.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    written = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": storage.to_json(settings),
    }
    return TokenizerFiles(written, end, end)


def load(source: str, setting: str) -> TokenizerFiles:
    """Load the tokenizer of a directory or hub id; ``setting`` is the config key that named it.

    Raises:
        DataError: there is none, it is not a fast one, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    place = storage.absolute(source)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            place if storage.exists(place) else source, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise DataError(f"{setting}: cannot load a tokenizer from {source}: {str(error).splitlines()[0]}") from error
    if not tokenizer.is_fast:
        raise DataError(f"{setting}: {source} has no tokenizer.json: save it as a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise DataError(f"{setting}: the tokenizer of {source} has no eos_token to end documents with: set one in it")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
    return TokenizerFiles(files, tokenizer.eos_token_id, pad)


@lru_cache(2)
def encoder(serialised: str) -> Any:
    """The tokenizers library's tokenizer. A special token spelt out in a document is text to it, not that token."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(serialised)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
