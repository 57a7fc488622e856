"""Generates a few tokens with the installed wheel, away from any checkout."""

from pathlib import Path

import lightmoe
from lightmoe import LLM, SamplingParams


def main() -> None:
    checkout = Path(lightmoe.__file__).parents[1]
    assert not (checkout / "pyproject.toml").exists(), f"{checkout} is a checkout, not a wheel"
    greedy = SamplingParams(max_tokens=16, temperature=0)
    outputs = LLM("mixtral-lite", gpus=2).generate(["def fibonacci(n):"], greedy)
    text = outputs[0].outputs[0].text
    assert text.strip(), "the wheel generated no text"
    print(f"lightmoe {lightmoe.__version__} from {checkout}: {text!r}")


if __name__ == "__main__":
    main()
