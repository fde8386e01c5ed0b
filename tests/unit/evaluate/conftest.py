from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parents[2] / "golden" / "summary.json"


@pytest.fixture
def summary() -> dict[str, Any]:
    """A finished run's summary, in the form that `pipeline.close` writes."""
    loaded: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return loaded
