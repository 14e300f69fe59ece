"""What JSON Schema cannot say of a request, said to schemathesis.

``SCHEMATHESIS_HOOKS=tests.unit.schemathesis_hooks st run http://127.0.0.1:8000/openapi.json`` uses it too.
"""

from __future__ import annotations

import re
from typing import Any

import schemathesis

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@schemathesis.hook
def map_body(_: Any, body: Any) -> Any:
    """A tool that is named in ``tool_choice`` is one of ``tools``."""
    try:
        tool, chosen = body["tools"][0]["function"]["name"], body["tool_choice"]["function"]
        if NAME.fullmatch(tool) and NAME.fullmatch(chosen["name"]):
            chosen["name"] = tool
    except (TypeError, KeyError, IndexError):
        pass  # there is no such pair in this body
    return body
