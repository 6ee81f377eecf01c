"""What the servers of eff share: JSON bodies with limits, errors, events, keys, static pages and shutdown."""

from importlib.metadata import version

from eff_http.disconnect import ClientGoneError, unless_disconnected
from eff_http.errors import ApiError, bad_request, internal_error, retry_later
from eff_http.gate import LOOPBACK_HOSTS, Gate, GateRules
from eff_http.handlers import add_error_handlers
from eff_http.jsonbody import BodyLimits, JsonRoute, parse_json, read_body
from eff_http.keys import read_keys
from eff_http.page import add_static_page
from eff_http.schema import MAX_INT, ErrorBody, ErrorResponse, Int, RequestModel, refuse
from eff_http.server import DrainingServer, log_to_stderr
from eff_http.sse import EventStream, SendEvent

__all__ = [
    "LOOPBACK_HOSTS",
    "MAX_INT",
    "ApiError",
    "BodyLimits",
    "ClientGoneError",
    "DrainingServer",
    "ErrorBody",
    "ErrorResponse",
    "EventStream",
    "Gate",
    "GateRules",
    "Int",
    "JsonRoute",
    "RequestModel",
    "SendEvent",
    "__version__",
    "add_error_handlers",
    "add_static_page",
    "bad_request",
    "internal_error",
    "log_to_stderr",
    "parse_json",
    "read_body",
    "read_keys",
    "refuse",
    "retry_later",
    "unless_disconnected",
]

__version__ = version("eff-http")
