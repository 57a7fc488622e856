"""Text to token ids and back, for the server and for offline use. Knows no HTTP and no asyncio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.decoders import DecodeStream

from lightmoe.errors import CheckpointError, RequestError
from lightmoe.server.chat_template import ChatTemplate
from lightmoe.server.token_bytes import TokenBytes

MAX_PENDING_TOKENS = 16
NUM_CONTEXT_TOKENS = 8
REPLACEMENT = "\ufffd"


class Tokenizer:
    """The tokenizer of a model folder; `chat_template` is None where the folder has none.

    Text never becomes a special token: `</s>` spelled in a prompt is five ordinary characters.
    Safe to use from several threads.
    """

    def __init__(self, definition: str, chat_template: ChatTemplate | None = None) -> None:
        self._text = FastTokenizer.from_str(definition)
        self._text.encode_special_tokens = True
        self._template = FastTokenizer.from_str(definition)
        for tokenizer in (self._text, self._template):
            tokenizer.no_truncation()
            tokenizer.no_padding()
        self.chat_template = chat_template
        self._special_ids = frozenset(
            token_id
            for token_id, token in self._text.get_added_tokens_decoder().items()
            if token.special
        )
        self._token_bytes = TokenBytes(self._text)

    @classmethod
    def from_folder(cls, folder: Path) -> Self | None:
        """The tokenizer of a model folder, or None if it has no tokenizer.json.

        Raises CheckpointError, naming the file, for one that cannot be used.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        template = ChatTemplate.from_folder(folder)
        try:
            return cls(path.read_text(encoding="utf-8"), template)
        except Exception as error:  # the tokenizers library raises bare Exceptions
            raise CheckpointError(
                f"{path} is not a tokenizer ({str(error)[:200]}); fetch the model folder again"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._text.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; `add_special_tokens` puts the model's own start token in front."""
        return _ids(self._text, text, add_special_tokens)

    def fewest_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, known without encoding."""
        longest = self._token_bytes.longest
        return 0 if longest is None else len(text) // longest

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are no UTF-8 become U+FFFD; unknown ids are skipped."""
        return str(self._text.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        The template's special tokens are encoded as such. A message that spells one is refused
        (RequestError): with a template the two could not be told apart afterwards.
        """
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template; send the text to /v1/completions", "messages"
            )
        for message in messages:
            self._refuse_special_tokens(message)
        return _ids(self._template, self.chat_template.render(messages), False)

    def _refuse_special_tokens(self, message: Mapping[str, str]) -> None:
        for text in message.values():
            for token_id in _ids(self._template, text, False):
                if token_id in self._special_ids:
                    spelled = self._text.id_to_token(token_id)
                    raise RequestError(
                        f"a message spells the special token {spelled!r}; leave it out", "messages"
                    )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole UTF-8 characters."""
        return self._token_bytes[token_id]

    def token_text(self, token_id: int) -> str:
        """A token as text; one that is no valid UTF-8 stays distinct as `bytes:\\xf0\\x9f`."""
        content = self.token_bytes(token_id)
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def new_stream(
        self, skip_special_tokens: bool, context: Sequence[int] = ()
    ) -> tuple[FastTokenizer, DecodeStream]:
        """What decodes token by token, after `context`; the pair belongs together."""
        stream = DecodeStream(ids=list(context), skip_special_tokens=skip_special_tokens)
        return self._text, stream


def _ids(tokenizer: FastTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    # encode() holds the interpreter lock for as long as it runs, encode_batch() lets it go.
    (encoding,) = tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)
    return list(encoding.ids)


class TextStream:
    """Turns the tokens of one answer into text, piece by piece.

    No piece ends inside a character, and text that may be the start of a stop string is held
    back until it is known. Once a stop string is complete, `stopped` is true, and neither it nor
    anything after it is returned. `prompt_token_ids` settle whether the first piece begins with a
    space (tokenizers that mark words by it drop it at the start of a text).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        skip_special_tokens: bool = True,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self.stop_string: str | None = None
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._skip_special_tokens = skip_special_tokens
        self._held = ""
        self._begin(prompt_token_ids[-NUM_CONTEXT_TOKENS:])

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; `stop_string` says which."""
        return self.stop_string is not None

    def add(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens; returns the text that is now certain, often ""."""
        pieces = []
        for token_id in token_ids:
            if self.stopped:
                break
            self._held += self._decode(token_id)
            pieces.append(self._release())
        return "".join(pieces)

    def flush(self) -> str:
        """The text held back so far; call it once, after the last token.

        A character whose last bytes never came is left out.
        """
        if self.stopped:
            return ""
        self._held += self._undecoded().rstrip(REPLACEMENT)
        text = self._release()
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _begin(self, context: Sequence[int]) -> None:
        before = self._tokenizer.decode(context, self._skip_special_tokens)
        if before.endswith(REPLACEMENT):
            # A prompt cut inside a character: its bytes must not be repeated in the answer.
            context, before = (), ""
        self._fast, self._stream = self._tokenizer.new_stream(self._skip_special_tokens, context)
        self._ids = list(context)
        self._num_decoded = len(before)
        self._num_pending = 0

    def _decode(self, token_id: int) -> str:
        self._ids.append(token_id)
        piece = self._stream.step(self._fast, token_id)
        if piece is not None:
            self._num_decoded += len(piece)
            self._num_pending = 0
            return str(piece)
        self._num_pending += 1
        if self._num_pending < MAX_PENDING_TOKENS:
            return ""
        # No character has that many bytes: it is garbage, and the stream gets slow by keeping it.
        piece = self._undecoded()
        self._begin(())
        return piece

    def _undecoded(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)[self._num_decoded :]

    def _release(self) -> str:
        found = [(at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop_string = min(found)
            text, self._held = self._held[:at], ""
            return text
        end = len(self._held) - self._num_characters_in_doubt()
        text, self._held = self._held[:end], self._held[end:]
        return text

    def _num_characters_in_doubt(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stop):
                return length
        return 0
