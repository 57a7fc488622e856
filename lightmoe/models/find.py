"""Where model folders are looked up, and what generation_config.json says."""

from __future__ import annotations

import os
from pathlib import Path

from lightmoe.config import data_folders
from lightmoe.errors import ModelNotFoundError
from lightmoe.models.config import read_json

_GENERATION_FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def find_model(name_or_path: str) -> Path:
    """The folder of a path, or of a name in ./models, the checkout's or installed folder, or
    $LIGHTMOE_MODELS; ModelNotFoundError lists what was found."""
    path = Path(name_or_path).expanduser()
    if (path / "config.json").is_file():
        return path.resolve()
    named = os.environ.get("LIGHTMOE_MODELS")
    folders = [*data_folders("models"), *([Path(named)] if named else [])]
    for folder in folders:
        if (folder / name_or_path / "config.json").is_file():
            return (folder / name_or_path).resolve()
    if path.is_dir():
        raise ModelNotFoundError(f"{path} has no config.json; give a folder in Hugging Face layout")
    found = sorted(
        {entry.parent.name for folder in folders for entry in folder.glob("*/config.json")}
    )
    raise ModelNotFoundError(
        f"no model named {name_or_path!r}; found: {', '.join(found) or 'none'}"
        " (give one of these, a folder, or set LIGHTMOE_MODELS)"
    )


def generation_defaults(folder: Path) -> dict[str, float]:
    """Sampling fields of generation_config.json; greedy where it says do_sample false."""
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    raw = read_json(path)
    defaults = {
        name: raw[name] for name in _GENERATION_FIELDS if isinstance(raw.get(name), (int, float))
    }
    if raw.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults
