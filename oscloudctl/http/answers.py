"""JSON answers the way the original wrote them: compact, keys sorted."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from oscloudctl.http.legacy import build_failure


def answer_json(
    value: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Give `value` as a JSON response."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True, ensure_ascii=False)
    return Response(text, status, headers, media_type="application/json")


def answer_failure(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Give an error in the original's shape."""
    return answer_json(build_failure(message), status, headers)
