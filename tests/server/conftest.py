"""Fixtures of the HTTP tests; what they are made of is in fakes.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lightmoe.server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngine, new_client, new_engine, running_server, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(tokenizer_folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Iterator[FakeEngine]:
    engine = new_engine(tokenizer)
    yield engine
    engine.close()


@pytest.fixture
def http(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[TestClient]:
    with new_client(engine, tokenizer) as client:
        yield client


@pytest.fixture
def url(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[str]:
    with running_server(engine, tokenizer) as url:
        yield url
