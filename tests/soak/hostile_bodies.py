"""Bodies that are wrong, dear or huge, each with its route: a function of a seeded generator of random numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from tests.soak import hostile_schemas

MODEL, VOCABULARY, CONTEXT = "tiny", 1024, 2048
"""Of the endpoint that is asked."""
COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
MEBIBYTE = 1 << 20
NO_END = {"logit_bias": {"0": -100}}
SAY = [{"role": "user", "content": "def main"}]


@dataclass(frozen=True)
class Raw:
    """JSON, or what pretends to be, as it stands."""

    text: bytes


@dataclass(frozen=True)
class Body:
    path: str
    content: bytes


Maker = Callable[[Random], Body]


def written(fields: dict[str, Any]) -> bytes:
    """An object's JSON, in which `Raw` values stand as they are."""
    return b"{" + b",".join(_text(name) + b":" + _text(value) for name, value in fields.items()) + b"}"


def _text(value: Any) -> bytes:
    return value.text if isinstance(value, Raw) else json.dumps(value).encode()


def array(items: Iterable[bytes]) -> Raw:
    return Raw(b"[" + b",".join(items) + b"]")


def completion(**fields: Any) -> Body:
    return Body(COMPLETIONS, written({"model": MODEL, "prompt": "def main", "max_tokens": 8} | fields))


def chat(**fields: Any) -> Body:
    return Body(CHAT, written({"model": MODEL, "messages": SAY, "max_tokens": 8} | fields))


def embedding(given: Any) -> Body:
    return Body(EMBEDDINGS, written({"model": MODEL, "input": given}))


def tokenize(prompt: Any) -> Body:
    return Body(TOKENIZE, written({"prompt": prompt}))


# Up to some hundred kilobytes.


def under_schema(schema: Any, draw: Random) -> Body:
    """A chat that asks for the schema, as the answer's format or as a tool's parameters."""
    if draw.random() < 0.6:
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        return chat(response_format=wanted, stream=draw.random() < 0.3, max_tokens=32)
    tool = {"type": "function", "function": {"name": "act", "parameters": schema}}
    choice = draw.choice(["auto", "required", {"type": "function", "function": {"name": "act"}}])
    return chat(tools=[tool], tool_choice=choice, max_tokens=32)


def schema_of(make: Callable[[Random], Any]) -> Maker:
    return lambda draw: under_schema(make(draw), draw)


NUMBERS = [
    *[b"NaN", b"Infinity", b"-Infinity", b"1e400", b"-1e400", b"1e-400", b"-0.0", b"-1", b"0", b"1.5", b"true", b'"5"'],
    *[b"1" * 30, b"9" * 5000, b"-" + b"9" * 5000, b"9223372036854775808", b"2147483648", b"4294967296", b"1e9"],
    *[b"null", b"[]", b"{}", b"0x10", b"01", b"1.", b"2.0", b"1_000", b"128", b"129", b"1e308", b"5e-324"],
]
NUMERIC = ["max_tokens", "n", "best_of", "temperature", "top_p", "top_k", "seed", "logprobs", "top_logprobs"]
NUMERIC += ["presence_penalty", "frequency_penalty", "max_completion_tokens", "stop", "stream", "echo", "dimensions"]


def odd_numbers(draw: Random) -> Body:
    fields = {name: Raw(draw.choice(NUMBERS)) for name in draw.sample(NUMERIC, draw.randint(1, 3))}
    return draw.choice([completion, chat])(**fields)


def odd_token_ids(draw: Random) -> Body:
    odd = draw.choice([*NUMBERS, b"1024", b"1023", b'"a"', b"[1]"])
    ids = array([b"5", b"6", odd, b"7"])
    if draw.random() < 0.3:
        return Body(DETOKENIZE, written({"tokens": ids}))
    return draw.choice([completion(prompt=ids), embedding(ids), completion(prompt=array([ids.text, b"[]"]))])


def whole_bias(draw: Random) -> Body:
    bias = {str(token): draw.choice([-100, 100, 1.5, 0]) for token in range(draw.choice([VOCABULARY, 10_000]))}
    return completion(logit_bias=bias, max_tokens=draw.choice([8, 200]))


def bad_bias(draw: Random) -> Body:
    odd = ["a", "-1", "1e3", " 1", "01", "9" * 400, "", "\ud800", "1024", "4294967296", "١"]
    keys = [f"{draw.choice(odd)}{at or ''}" for at in range(draw.choice([1, 5000]))]
    return completion(logit_bias=Raw(written({key: draw.choice([1, 101, "1", None]) for key in keys})))


def one_byte_forever(draw: Random) -> Body:
    """Most of the first tokens are single bytes; many of those never become a character."""
    return completion(
        logit_bias={str(draw.randint(1, 256)): 100}, max_tokens=draw.choice([50, 500]), stream=draw.random() < 0.5
    )


def many_choices(draw: Random) -> Body:
    return completion(n=draw.choice([2, 8, 9, 17, 128, 129]), max_tokens=draw.choice([1, 32]), **NO_END)


def many_prompts(draw: Random) -> Body:
    prompts = [f"def f{at}" for at in range(draw.choice([2, 25, 300, 3000]))]
    return completion(prompt=prompts, n=draw.choice([1, 2]), max_tokens=draw.choice([0, 1, 16]))


def many_texts(draw: Random) -> Body:
    return embedding([f"def f{at}" for at in range(draw.choice([24, 25, 288, 3000]))])


def echoed(draw: Random) -> Body:
    return completion(prompt="def main " * draw.randint(1, 500), echo=True, logprobs=20, max_tokens=0)


def over_long(draw: Random) -> Body:
    text = draw.choice(["x", "def main ", "模型", "\u0301"]) * draw.randint(1000, 20_000)
    said = [{"role": "user", "content": text}]
    return draw.choice([completion(prompt=text), chat(messages=said), embedding(text), tokenize(text)])


def odd_stops(draw: Random) -> Body:
    stops = [
        ["a"] * 16,
        ["a"] * 17,
        "",
        [""],
        ["\ud800"],
        "x" * 100_000,
        ["\ufffd"],
        [" ", "\n"],
        [1],
        {"a": 1},
        "\x00",
    ]
    return completion(stop=draw.choice(stops), max_tokens=64)


def odd_text(draw: Random) -> Body:
    odd = draw.choice(
        ["\ud800", "a\udfff", "\x00", "\ufeff", "\u202e", "e" + "\u0301" * 3000, "👍🏽" * 500, "<|end|>" * 300]
    )
    where = draw.choice(["content", "role", "model", "field", "user", "name", "tokenize", "stop"])
    match where:
        case "content":
            return chat(messages=[{"role": "user", "content": odd}])
        case "role":
            return chat(messages=[{"role": odd, "content": "a"}])
        case "name":
            return chat(messages=[{"role": "user", "content": "a", "name": odd}])
        case "field":
            return chat(**{odd: 1})
        case "tokenize":
            return tokenize(odd)
    return completion(**{where: odd})


def deep(draw: Random) -> Body:
    depth = draw.choice([100, 600, 900, 3000, 50_000])
    opened, closed = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    found = opened * depth + draw.choice([b"1", b""]) + closed * depth
    match draw.choice(["body", "metadata", "content", "prompt", "schema", "parameters", "unheard_of", "logit_bias"]):
        case "body":
            return Body(draw.choice([COMPLETIONS, CHAT, TOKENIZE, EMBEDDINGS]), found)
        case "schema":
            return under_schema_text(found)
        case "parameters":
            return chat(tools=Raw(b'[{"type":"function","function":{"name":"a","parameters":' + found + b"}}]"))
        case "content":
            return chat(messages=Raw(b'[{"role":"user","content":' + found + b"}]"))
        case field:
            return completion(**{field: Raw(found)})


def mixed_fields(draw: Random) -> Body:
    """A known field with a value of another one's type, or a field nobody knows."""
    values: list[Any] = [None, True, 0, -1, 1.5, "", "a", [], [[]], {}, {"type": "text"}, [None], {"a": {"b": [1]}}]
    names = ["model", "prompt", "messages", "stream_options", "response_format", "tools", "tool_choice", "logit_bias"]
    names += ["modalities", "functions", "suffix", "user", "metadata", "temprature", "", "__class__", "max_tokens"]
    fields = {name: draw.choice(values) for name in draw.sample(names, draw.randint(1, 3))}
    return draw.choice([completion, chat])(**fields)


def broken(draw: Random) -> Body:
    whole = completion().content
    cut = draw.randint(0, len(whole) - 1)
    odd = [
        whole[:cut],
        whole[:cut] + b"\xff\xfe" + whole[cut:],
        whole + b"}",
        b"",
        b"null",
        b"[]",
        b"\xef\xbb\xbf" + whole,
    ]
    odd += [whole.decode().encode("utf-16"), b"model=tiny&prompt=a", whole[:cut] + b"\x00" + whole[cut:]]
    return Body(draw.choice([COMPLETIONS, CHAT, EMBEDDINGS, TOKENIZE, DETOKENIZE]), draw.choice(odd))


def long_answer(draw: Random) -> Body:
    """A request that is right, and keeps the engine busy."""
    fields: dict[str, Any] = {"max_tokens": draw.randint(50, 400), "stream": draw.random() < 0.5, **NO_END}
    fields |= draw.choice([{}, {"logprobs": 20}, {"n": 4}, {"frequency_penalty": 1.5}, {"stop": ["zqx"]}])
    return completion(**fields)


SMALL: dict[str, Maker] = {
    f"schema, {make.__name__.replace('_', ' ')}": schema_of(make)
    for make in [*hostile_schemas.KINDS, hostile_schemas.together]
} | {
    make.__name__.replace("_", " "): make
    for make in [
        *[odd_numbers, odd_token_ids, whole_bias, bad_bias, one_byte_forever, many_choices, many_prompts, many_texts],
        *[echoed, over_long, odd_stops, odd_text, deep, mixed_fields, broken, long_answer],
    ]
}

# Of a mebibyte and more; what the gateway takes ends at eight.


def size(draw: Random) -> int:
    return round(MEBIBYTE * 2 ** draw.uniform(0.02, 2.99))


def filled(draw: Random, item: bytes) -> Raw:
    """A list of as many items as make up a size."""
    return array([item] * (size(draw) // (len(item) + 1)))


def numbered(draw: Random, item: bytes) -> bytes:
    """As many items, each with its number, as make up a size."""
    return b",".join(item % at for at in range(size(draw) // (len(item % 0) + 1)))


def huge_content(draw: Random) -> Body:
    item = draw.choice([b"{}", b"[]", b"1", b'{"type":"text"}', b'{"type":"text","text":1}', b'{"type":"image_url"}'])
    return chat(messages=Raw(b'[{"role":"user","content":' + filled(draw, item).text + b"}]"))


def huge_messages(draw: Random) -> Body:
    return chat(
        messages=filled(draw, draw.choice([b"{}", b'{"role":"user","content":"a"}', b'{"role":"user"}', b"null"]))
    )


def huge_unknown_fields(draw: Random) -> Body:
    fields = numbered(draw, b'"f%07d":1')
    return Body(draw.choice([COMPLETIONS, CHAT, EMBEDDINGS]), completion().content[:-1] + b"," + fields + b"}")


def huge_bias(draw: Random) -> Body:
    key = draw.choice([b'"k%08d":1', b'"%09d":1', b'"1%08d":null', b'"1%08d":1000'])
    return completion(logit_bias=Raw(b"{" + numbered(draw, key) + b"}"))


def huge_token_ids(draw: Random) -> Body:
    item = draw.choice([b"1", b"1023", b"1024", b'"1"', b"-1", b"1.0", b"[1]", b"null", b"[]"])
    ids = filled(draw, item)
    return draw.choice([completion(prompt=ids), embedding(ids), Body(DETOKENIZE, written({"tokens": ids}))])


def huge_prompts(draw: Random) -> Body:
    texts = filled(draw, draw.choice([b'"a"', b'""', b'"def main"', b'"\\ud800"']))
    return draw.choice([completion(prompt=texts), embedding(texts)])


def huge_text(draw: Random) -> Body:
    unit = draw.choice([b"x", b"def main ", "模型".encode(), b"\\u0041", b"\\ud83d\\ude42", b" ", b"\\n", b"ab1 "])
    text = Raw(b'"' + unit * (size(draw) // len(unit)) + b'"')
    said = Raw(b'[{"role":"user","content":' + text.text + b"}]")
    makers = [completion(prompt=text), chat(messages=said), tokenize(text), embedding(text), completion(stop=text)]
    return draw.choice([*makers, completion(user=text), completion(model=text), chat(unheard_of=text)])


def huge_tools(draw: Random) -> Body:
    tool = b'{"type":"function","function":{"name":"a","parameters":{}}}'
    return chat(tools=filled(draw, draw.choice([b"{}", tool, b'{"type":"function"}'])))


def huge_schema(draw: Random) -> Body:
    kind = draw.choice([b'"enum":', b'"anyOf":', b'"allOf":', b'"required":', b'"prefixItems":'])
    item = draw.choice([b'"some value"', b'{"type":"string"}', b"{}", b'{"pattern":"^a+b$"}'])
    return under_schema_text(b'{"type":"object",' + kind + filled(draw, item).text + b"}")


def huge_properties(draw: Random) -> Body:
    return under_schema_text(b'{"type":"object","properties":{' + numbered(draw, b'"p%07d":{"type":"integer"}') + b"}}")


def under_schema_text(schema: bytes) -> Body:
    return chat(response_format=Raw(b'{"type":"json_schema","json_schema":{"name":"a","schema":' + schema + b"}}"))


def huge_nonsense(draw: Random) -> Body:
    unit = draw.choice([b"[", b'{"a":', b" ", b"1", b"\x00", b"\xff", b'"', b"[{},", b"//", b"-", b"\n"])
    return Body(draw.choice([COMPLETIONS, CHAT, TOKENIZE, DETOKENIZE]), unit * (size(draw) // len(unit)))


def huge_duplicates(draw: Random) -> Body:
    return Body(COMPLETIONS, b"{" + b'"prompt":"a",' * (size(draw) // 13) + b'"model":"tiny"}')


def over_the_limit(draw: Random) -> Body:
    return completion(prompt="x" * (9 * MEBIBYTE))


BIG: dict[str, Maker] = {
    make.__name__.replace("_", " "): make
    for make in [
        *[huge_content, huge_messages, huge_unknown_fields, huge_bias, huge_token_ids, huge_prompts, huge_text],
        *[huge_tools, huge_schema, huge_properties, huge_nonsense, huge_duplicates, over_the_limit],
    ]
}
