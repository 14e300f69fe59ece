import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from raymodels.data.tokenizer import END_OF_TEXT, TokenizerFiles, encoder, load, train
from raymodels.errors import DataError

TEXTS = ["def main():\n    return 1\n", "  two  spaces\tand a tab", "naïve café – 東京 🙂", "class A:\n    pass\n"] * 20
TRAINED = train(TEXTS, 400)


@given(st.text(st.characters(blacklist_categories=("Cs",))))
def test_every_text_decodes_to_itself(text: str) -> None:
    tokenizer = encoder(TRAINED.serialised)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_spelt_out_special_token_is_text() -> None:
    ids = encoder(TRAINED.serialised).encode(f"a{END_OF_TEXT}b").ids
    assert TRAINED.eos_id not in ids


def test_training_is_deterministic() -> None:
    assert train(list(TEXTS), 400) == TRAINED


def test_trained_tokenizer_loads_in_transformers(tmp_path) -> None:
    TRAINED.write(str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END_OF_TEXT
    assert len(tokenizer) == TRAINED.vocab_size <= 400
    for text in TEXTS[:4]:
        ids = tokenizer(text).input_ids
        assert ids == encoder(TRAINED.serialised).encode(text).ids
        assert tokenizer.decode(ids) == text


def test_loading_keeps_the_fingerprint(tmp_path) -> None:
    TRAINED.write(str(tmp_path))
    loaded = load(str(tmp_path), "data.tokenizer.from")
    assert loaded.fingerprint == TRAINED.fingerprint
    assert (loaded.eos_id, loaded.pad_id, loaded.vocab_size) == (TRAINED.eos_id, TRAINED.pad_id, TRAINED.vocab_size)


def test_fingerprint_is_of_what_decides_the_ids() -> None:
    layout = json.dumps(json.loads(TRAINED.serialised) | {"truncation": None, "post_processor": None}).encode()
    again = TokenizerFiles({"tokenizer.json": layout, "chat_template.jinja": b"x"}, TRAINED.eos_id, 7)
    assert again.fingerprint == TRAINED.fingerprint
    assert train(TEXTS, 300).fingerprint != TRAINED.fingerprint


def test_missing_tokenizer_names_the_setting(tmp_path) -> None:
    with pytest.raises(DataError, match=r"^data\.tokenizer\.from: cannot load a tokenizer from .*[^\n]$"):
        load(str(tmp_path / "none"), "data.tokenizer.from")


def test_tokenizer_without_end_of_text_is_refused(tmp_path) -> None:
    TRAINED.write(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="no eos_token"):
        load(str(tmp_path), "data.tokenizer.from")
