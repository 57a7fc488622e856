"""The chat template of a model folder: messages to one text, rendered in a sandbox.

Only the folder's own template is ever rendered, never one from a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, Self

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lightmoe.errors import CheckpointError, RequestError


class ChatTemplate:
    """A compiled template and the special tokens that it may name (`bos_token`, `eos_token`)."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """Reads chat_template.jinja, else the template in tokenizer_config.json; None without."""
        config_path = folder / "tokenizer_config.json"
        config = _read_json(config_path) if config_path.is_file() else {}
        path = folder / "chat_template.jinja"
        try:
            if path.is_file():
                source: str | None = path.read_text(encoding="utf-8")
            else:
                path, source = config_path, _default_template(config.get("chat_template"))
            return None if source is None else cls(source, _special_tokens(config))
        except (TemplateError, UnicodeDecodeError) as error:
            raise CheckpointError(f"the chat template in {path} is broken: {error}") from error

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The conversation as the model reads it, ending where the answer begins.

        Raises RequestError when the template refuses the messages (their order, say).
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                **self._special_tokens,
            )
        # Templates index and add what they find, so odd messages end in these too.
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", "messages"
            ) from error


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment that templates on the hub are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _default_template(entry: Any) -> str | None:
    """`chat_template` is one template, or a list of named ones of which `default` is meant."""
    if isinstance(entry, list):
        named = {part["name"]: part["template"] for part in entry}
        return named.get("default")
    return entry if isinstance(entry, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; each is a text, or an object with the text as `content`."""
    tokens = {}
    for name, entry in config.items():
        if name.endswith("_token"):
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                tokens[name] = text
    return tokens


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); fetch the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object; fetch the model folder again")
    return content
