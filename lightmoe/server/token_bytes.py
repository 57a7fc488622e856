"""What bytes a token stands for: tokenizers write them in alphabets of their own."""

from __future__ import annotations

import json
import re
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level BPE: printable Latin-1 is itself, the rest follows 255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


class TokenBytes:
    """Token id -> bytes, read off the kind of decoder that the tokenizer has.

    `longest` is the most bytes that one token stands for; None where that bounds nothing
    (a normalizer may shorten texts, an unknown token stands for any).
    """

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        definition = json.loads(tokenizer.to_str())
        kinds = _decoder_kinds(definition["decoder"])
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._has_byte_tokens = "ByteFallback" in kinds
        self.longest: int | None = None
        if self._alphabet is not None and definition["normalizer"] is None:
            self.longest = max(len(self[token_id]) for token_id in tokenizer.get_vocab().values())

    def __getitem__(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None and all(letter in self._alphabet for letter in token):
            return bytes(self._alphabet[letter] for letter in token)
        if self._has_byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _decoder_kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    kinds = {decoder["type"]}
    for part in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds
