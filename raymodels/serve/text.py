"""Between token ids and text: encoding prompts, decoding streams without ever cutting a character or a stop string."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from raymodels.errors import ServeError

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST_BEGINNING = 3
"""Bytes that a character can lack its end of: those of UTF-8 have at most four."""
SHRINKS = 3
"""By how much NFC makes a text shorter at most, in bytes: a character of three bytes for its parts of nine."""
RAW_KEPT = 2**16
"""Tokens whose bytes are kept: log-probabilities name the same ones again and again."""
CONTEXT = 8
"""Tokens before a stream that its decoding starts from: some tokenizers drop a space where a text begins."""


class Text:
    """A model's tokenizer.

    Args:
        ends: token ids that end a text; the tokenizer's own unless given.

    Raises:
        ServeError: the tokenizer has no `tokenizers` backend, which decoding token by token needs.
    """

    def __init__(self, tokenizer: Any, ends: Iterable[int] | None = None) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ServeError(f"{type(tokenizer).__name__} is a slow tokenizer: export the model with a tokenizer.json")
        self.backend = backend
        self._tokenizer = tokenizer
        self._byte_level = "ByteLevel" in repr(backend.decoder)
        self._special = set(tokenizer.all_special_ids)
        self._mute = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self.size = len(tokenizer)
        # Encoding goes past the tokenizer's own front, which sets these for each text: two threads could not do that.
        backend.no_truncation()
        backend.no_padding()
        self._longest = _longest(backend) if self._byte_level else None
        # The bytes that a token stands for; they may be part of a character.
        self.raw = lru_cache(maxsize=RAW_KEPT)(self._raw)
        own = () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)
        self.ends = frozenset(own if ends is None else ends)

    @classmethod
    def of(cls, model_dir: str) -> Self:
        """The tokenizer of a directory in Hugging Face layout, with the ends that its generation config names."""
        try:
            settings = GenerationConfig.from_pretrained(model_dir)
        except OSError:
            config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
            settings = GenerationConfig.from_model_config(config)
        ends = settings.eos_token_id
        tokenizer = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=False)
        return cls(tokenizer, [ends] if isinstance(ends, int) else ends)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Raises:
            ValueError: it holds a lone surrogate, which is no character.
        """
        text.encode()  # UnicodeEncodeError is a ValueError; the tokenizer's own error would not say what is wrong
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    def count(self, text: str) -> int:
        """Tokens of a part of a text; what is no character counts as one."""
        characters = text.encode(errors="replace").decode()
        return len(self.backend.encode_batch_fast([characters], add_special_tokens=False)[0])

    def fewest(self, text: str) -> int:
        """A number of tokens that the text has at least, known without encoding it; 0 where none is."""
        return 0 if self._longest is None else len(text) // self._longest

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of token ids; special tokens only have one if ``special`` is set."""
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template if template is None or isinstance(template, str) else str(template.get("default", ""))

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_template)

    def chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, open_answer: bool = True
    ) -> str:
        """A conversation as the model was trained on it, up to where the assistant's answer begins.

        Raises:
            Exception: whatever the model's own template raises.
        """
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools or None, add_generation_prompt=open_answer, tokenize=False
            )
        )

    def describe(self) -> dict[str, Any]:
        """The tokenizer's class and special tokens."""
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: getattr(self._tokenizer, name) for name in names}
        return {"tokenizer_class": type(self._tokenizer).__name__, "vocab_size": self.size, **tokens}

    @property
    def start(self) -> int | None:
        """The token that stands before an empty text."""
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return None

    def mute(self, id: int) -> bool:
        """Whether a token has no text: a special one, or an id of a padded vocabulary that is no token."""
        return id in self._mute or self.backend.id_to_token(id) is None

    def _raw(self, id: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(id) or ""  # a padded vocabulary has ids without a token
        if id in self._special:
            return piece.encode()
        if self._byte_level:
            table = _byte_of_character()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            return bytes.fromhex(byte[1])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


@dataclass
class TextStream:
    """Decodes one choice token by token, holding back what may still change: a started character or stop string.

    Once `stopped`, the text is complete and further tokens must not be pushed.
    """

    text: Text
    prompt: Sequence[int] = ()
    stops: tuple[str, ...] = ()
    stopped: bool = False
    decoded: int = field(default=0, init=False)
    """Characters decoded so far, held back or not: where the next token's text begins."""
    released: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        context = list(self.prompt[-CONTEXT:])
        self._window = [] if REPLACEMENT in self.text.decode(context) else context
        self._settle()
        self._held = ""

    def push(self, id: int) -> str:
        """The text that is certain now."""
        if self.text.mute(id):
            return ""
        self._window.append(id)
        text, begun = self._certain()
        fresh = self._after(text, begun)
        if not fresh and len(self._window) - self._settled <= LONGEST_BEGINNING:
            return ""
        self._window = self._window[self._settled :]
        self._settle()
        return self._accept(fresh, last=False)

    def flush(self) -> str:
        """The rest, once no more tokens come; bytes that never became a character are replacement characters."""
        if self.stopped:
            return ""
        return self._accept(self._after(self.text.decode(self._window), 0), last=True)

    def _certain(self) -> tuple[str, int]:
        """The window's text without a character that is begun at its end, and how many tokens hold that beginning."""
        text = self.text.decode(self._window)
        if not text.endswith(REPLACEMENT):
            return text, 0
        held = list(map(self.text.raw, self._window[-LONGEST_BEGINNING:]))
        end = b"".join(held)[-LONGEST_BEGINNING:]
        size, begun = next((size for size in range(len(end), 0, -1) if _begins(end[-size:])), 0), 0
        while size > 0:
            begun += 1
            size -= len(held[-begun])
        if size < 0:  # the token ends another character too: what is begun decodes to one replacement character
            return text[: -len(REPLACEMENT)], begun
        return (self.text.decode(self._window[:-begun]) if begun else text), begun

    def _after(self, text: str, begun: int) -> str:
        """What a text of the window holds beyond that which was taken."""
        if text.startswith(self._before):
            return text[len(self._before) :]
        # With byte fallback, a byte that is no character makes replacements of the characters beside it too.
        return self.text.decode(self._window[self._settled : len(self._window) - begun])

    def _settle(self) -> None:
        """The window's text has been taken: its tokens are context from here on, but those of a begun character."""
        self._before, begun = self._certain()
        self._settled = len(self._window) - begun

    def _accept(self, fresh: str, last: bool) -> str:
        self.decoded += len(fresh)
        held = self._held + fresh
        cut = min((at for stop in self.stops if (at := held.find(stop)) >= 0), default=None)
        if cut is not None:
            self.stopped = True
            certain = held[:cut]
        else:
            certain = held if last else held[: len(held) - self._started_stop(held)]
        self._held = held[len(certain) :]
        self.released += len(certain)
        return certain

    def _started_stop(self, held: str) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        sizes = range(min(longest, len(held)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(held[-size:]) for stop in self.stops)), 0)


def _begins(end: bytes) -> bool:
    """Whether bytes are the beginning of a character in UTF-8, and not all of it."""
    try:
        end.decode()
    except UnicodeDecodeError as error:
        return error.start == 0 and error.reason == "unexpected end of data"
    return False


def _longest(backend: Any) -> int | None:
    """The most bytes of text that a token of a byte-level vocabulary stands for; none if one may be for any many."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip for token in added):
        return None
    shrinks = {"": 1, "NFC": SHRINKS}.get(type(backend.normalizer).__name__ if backend.normalizer else "")
    if shrinks is None:
        return None
    pieces = max(map(len, backend.get_vocab(with_added_tokens=False)), default=1)  # one character of which is one byte
    return shrinks * max([pieces, *(len(token.content.encode()) for token in added)])


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes every byte as one printable character; this is the table back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    shifted = {chr(256 + position): byte for position, byte in enumerate(rest)}
    return {chr(byte): byte for byte in printable} | shifted
