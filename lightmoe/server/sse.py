"""Server-sent events: one JSON object an event, `[DONE]` at the end."""

from __future__ import annotations

import json
from typing import Any

DONE = "data: [DONE]\n\n"
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


def event(content: dict[str, Any]) -> str:
    """One event. JSON escapes line breaks, so the content is always one line."""
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"
