"""The tokenizer: a byte-level BPE trained on the corpus, and the settings transformers wants."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|endoftext|>"  # ids 0, 1, 2

# One alternative per line. Newlines and indentation are pieces of their own and are never joined
# with words, so a prompt may end anywhere (after a colon, a newline or an indent) and still be cut
# as the training text was.
SPLIT = "|".join(
    (
        r"\n+",
        r" {2,}",
        r" ?[\p{L}_]+",
        r" ?\p{N}",
        r" ?[^\s\p{L}\p{N}_]+",
        r"\s",
    )
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE: every string can be written and read back exactly."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A prompt is the start of a file. Without <bos> the model takes it for a piece from the middle
    # of one, most often from a class, and indents its answer accordingly.
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return tokenizer


# The model completes code, so the text is handed over as it is: the answer continues the last
# message.
CHAT_TEMPLATE = r"""{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- '# ' + message['content'].replace('\n', '\n# ') + '\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- message['content'] + '\n' -}}
{%- else -%}
{{- message['content'] -}}
{%- endif -%}
{%- endfor -%}
"""


def write_tokenizer_settings(folder: Path, max_positions: int) -> None:
    """What transformers wants beside tokenizer.json: its class, special tokens, chat template."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_positions,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
