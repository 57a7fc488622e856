"""`--record-routing`: what every rank's tokens chose, from the steps' results into a trace file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lightmoe.balancer.trace import TraceWriter
from lightmoe.core import StepResult
from lightmoe.errors import TraceError

logger = logging.getLogger("lightmoe.balancer")


class TraceRecorder:
    """A RoutingRecorder. What fails while it writes ends the record, not the server, and is logged.

    Raises TraceError at once where the folder cannot be written to.
    """

    def __init__(
        self, path: Path, num_layers: int, num_experts: int, num_experts_per_token: int
    ) -> None:
        self._path = path
        self._writer: TraceWriter | None = TraceWriter(
            path, num_layers, num_experts, num_experts_per_token
        )
        self._num_tokens = 0

    def add(self, results: Sequence[StepResult]) -> None:
        """One step's tokens, rank by rank."""
        if self._writer is None:
            return
        try:
            for result in results:
                if result.routing is not None:
                    sources = np.full(len(result.routing), result.rank)
                    self._writer.add(result.step, result.routing, sources)
                    self._num_tokens += len(result.routing)
        except TraceError as error:
            logger.error("the routing is recorded no more: %s", error)
            self._writer.discard()
            self._writer = None

    def close(self) -> None:
        """Make the file; without a token there is none."""
        writer, self._writer = self._writer, None
        if writer is None:
            return
        if not self._num_tokens:
            writer.discard()
            logger.warning("no token was run: %s was not written", self._path)
            return
        try:
            writer.close()
        except TraceError as error:
            logger.error("the routing of %d tokens is lost: %s", self._num_tokens, error)
            return
        logger.info("the routing of %d tokens is in %s", self._num_tokens, self._path)
