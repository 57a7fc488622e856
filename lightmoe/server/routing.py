"""POST /v1/experts/route: how tokens are split over an expert's copies, changed under traffic."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from lightmoe.server.body import read_json_body
from lightmoe.server.schema import RouteRequest, parse_request
from lightmoe.server.service import Service


async def set_route(service: Service, http_request: HttpRequest) -> Response:
    """From the next step on all ranks route this way; the tokens are the same with any route."""
    request = parse_request(await read_json_body(http_request), RouteRequest)
    service.engine.set_route(request.route)
    return JSONResponse({"route": request.route})
