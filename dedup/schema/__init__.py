"""The JSON Schema of the output, draft 2020-12."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def load() -> dict[str, Any]:
    """The schema of everything that `--json` prints."""
    text = (files(__name__) / "dedup.schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    assert isinstance(schema, dict)
    return schema
