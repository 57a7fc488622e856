"""Every error that Light-MoE raises on purpose.

    LightMoEError                   what is wrong, the value, the remedy: one line
    ├── UsageError                  the command or the arguments are wrong        exit 2
    ├── ModelError                  a model folder cannot be served               exit 1
    │   ├── ModelNotFoundError      no folder of that name
    │   ├── CheckpointError         a file is missing, broken or refused
    │   └── UnsupportedModelError   an architecture or option without code here
    ├── MachineError                port, memory, device, driver                  exit 1
    ├── PlacementError              experts cannot be placed on these ranks       exit 1
    ├── TraceError                  recorded routing cannot be read or written    exit 1
    ├── RankError                   a rank died or stopped answering              exit 1, 503
    └── RequestError                a request that cannot be served               400
        ├── UnknownModelError       another model's name                          404
        ├── RequestTooLargeError    a body over the limit                         413
        ├── QueueFullError          more requests than the queue holds            429
        └── ShuttingDownError       the server is draining                        503

Asserts are for invariants of the code only.
"""


class LightMoEError(Exception):
    """Base of all errors here; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(LightMoEError):
    """The command line, a recipe or an argument is wrong."""

    exit_code = 2


class ModelError(LightMoEError):
    """A model folder cannot be served."""


class ModelNotFoundError(ModelError):
    """No model folder of that name."""


class CheckpointError(ModelError):
    """A file of the checkpoint is missing, truncated, of the wrong shape or of a refused kind."""


class UnsupportedModelError(ModelError):
    """An architecture or an option of config.json that has no code here."""


class MachineError(LightMoEError):
    """The machine lacks something: a port, memory, a device, a driver."""


class PlacementError(LightMoEError):
    """Experts cannot be placed on these ranks."""


class TraceError(LightMoEError):
    """Recorded routing cannot be read or written, or is none."""


class RankError(LightMoEError):
    """A rank died, or did not answer in time."""

    http_status = 503


class RequestError(LightMoEError):
    """A request that cannot be served; `param` names the offending field."""

    http_status = 400
    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    http_status = 404
    code = "model_not_found"


class RequestTooLargeError(RequestError):
    """The body is over the limit."""

    http_status = 413
    code = "request_too_large"


class QueueFullError(RequestError):
    """More requests are waiting than the queue holds."""

    http_status = 429
    code = "queue_full"


class ShuttingDownError(RequestError):
    """The server is draining and takes no new requests."""

    http_status = 503
    code = "shutting_down"
