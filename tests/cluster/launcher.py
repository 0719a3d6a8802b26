"""The cluster files of both clouds as Ray's launcher sees them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws", "gcp")


def path(cloud: str) -> Path:
    return ROOT / "cluster" / f"{cloud}-a100.yaml"


def raw(cloud: str, mine: Mapping[str, str] | None = None) -> dict[str, Any]:
    """As it is written, `mine` (placeholder -> value) filled in."""
    text = path(cloud).read_text()
    for placeholder, value in (mine or {}).items():
        text = text.replace(placeholder, value, 1)
    return yaml.safe_load(text)


def prepared(raw: dict[str, Any]) -> dict[str, Any]:
    """With Ray's defaults filled in, and validated."""
    config = prepare_config(raw)
    validate_config(config)
    return config
