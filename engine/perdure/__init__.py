"""perdure runs tasks on AI platforms and keeps everything that happens to them in SQL.

::

    from perdure import Engine, Task

    async with Engine.open("sqlite:///perdure.db") as engine:
        task_id = await engine.submit_task(Task(prompt="…", platform="demo"))
        async for text in engine.stream_result(task_id):
            print(text, end="")
        result = await engine.get_result(task_id)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.adapter import (
        Adapter,
        Call,
        Capabilities,
        LoadedFile,
        Resume,
    )
    from perdure.appending import Timing
    from perdure.blocking import execute
    from perdure.engine import Engine
    from perdure.errors import (
        AuthenticationFailed,
        ConcurrencyError,
        ConnectionLost,
        ContentRefused,
        DatabaseCorrupt,
        DatabaseIncompatible,
        DatabaseUnavailable,
        DuplicateKey,
        EngineClosed,
        FinalError,
        InvalidConfig,
        InvalidRequest,
        InvalidTask,
        InvalidTransition,
        NotConfigured,
        OutputInvalid,
        Overloaded,
        PerdureError,
        PlatformError,
        PlatformTimeout,
        QuotaExhausted,
        RateLimited,
        RetryableError,
        RunningLoop,
        StoreError,
        StreamTruncated,
        TaskArchived,
        TaskNotFound,
        TasksUnreadable,
        TimeLimitExceeded,
        UnknownPlatform,
    )
    from perdure.events import (
        Accepted,
        Chunk,
        Completed,
        Event,
        FileCreated,
        RecordedEvent,
        UsageReported,
    )
    from perdure.policy import (
        RetryPolicy,
    )
    from perdure.settings import (
        WorkerSettings,
    )
    from perdure.store.claims import (
        Scope,
    )
    from perdure.store.records import (
        TaskFilter,
        TaskRecord,
    )
    from perdure.streaming import (
        StreamingResult,
        TextChunk,
        collect_stream,
    )
    from perdure.submission import (
        Submission,
    )
    from perdure.task import (
        Attachment,
        Message,
        Recovery,
        Result,
        Task,
        TaskConstraints,
        TaskStatus,
        TaskType,
        Tool,
        ToolCall,
        Usage,
    )

__all__ = [
    "Accepted",
    "Adapter",
    "Attachment",
    "AuthenticationFailed",
    "Call",
    "Capabilities",
    "Chunk",
    "Completed",
    "ConcurrencyError",
    "ConnectionLost",
    "ContentRefused",
    "DatabaseCorrupt",
    "DatabaseIncompatible",
    "DatabaseUnavailable",
    "DuplicateKey",
    "Engine",
    "EngineClosed",
    "Event",
    "FileCreated",
    "FinalError",
    "InvalidConfig",
    "InvalidRequest",
    "InvalidTask",
    "InvalidTransition",
    "LoadedFile",
    "Message",
    "NotConfigured",
    "OutputInvalid",
    "Overloaded",
    "PerdureError",
    "PlatformError",
    "PlatformTimeout",
    "QuotaExhausted",
    "RateLimited",
    "RecordedEvent",
    "Recovery",
    "Result",
    "Resume",
    "RetryPolicy",
    "RetryableError",
    "RunningLoop",
    "Scope",
    "StoreError",
    "StreamTruncated",
    "StreamingResult",
    "Submission",
    "Task",
    "TaskArchived",
    "TaskConstraints",
    "TaskFilter",
    "TaskNotFound",
    "TaskRecord",
    "TaskStatus",
    "TaskType",
    "TasksUnreadable",
    "TextChunk",
    "TimeLimitExceeded",
    "Timing",
    "Tool",
    "ToolCall",
    "UnknownPlatform",
    "Usage",
    "UsageReported",
    "WorkerSettings",
    "collect_stream",
    "execute",
]

# Loaded when first asked for: `perdure --help` needs neither SQLAlchemy nor the engine.
_HOMES = {
    "perdure.adapter": (
        "Adapter",
        "Call",
        "Capabilities",
        "LoadedFile",
        "Resume",
    ),
    "perdure.appending": ("Timing",),
    "perdure.blocking": ("execute",),
    "perdure.engine": ("Engine",),
    "perdure.errors": (
        "AuthenticationFailed",
        "ConcurrencyError",
        "ConnectionLost",
        "ContentRefused",
        "DatabaseCorrupt",
        "DatabaseIncompatible",
        "DatabaseUnavailable",
        "DuplicateKey",
        "EngineClosed",
        "FinalError",
        "InvalidConfig",
        "InvalidRequest",
        "InvalidTask",
        "InvalidTransition",
        "NotConfigured",
        "OutputInvalid",
        "Overloaded",
        "PerdureError",
        "PlatformError",
        "PlatformTimeout",
        "QuotaExhausted",
        "RateLimited",
        "RetryableError",
        "RunningLoop",
        "StoreError",
        "StreamTruncated",
        "TaskArchived",
        "TaskNotFound",
        "TasksUnreadable",
        "TimeLimitExceeded",
        "UnknownPlatform",
    ),
    "perdure.events": (
        "Accepted",
        "Chunk",
        "Completed",
        "Event",
        "FileCreated",
        "RecordedEvent",
        "UsageReported",
    ),
    "perdure.policy": ("RetryPolicy",),
    "perdure.settings": ("WorkerSettings",),
    "perdure.store.claims": ("Scope",),
    "perdure.store.records": (
        "TaskFilter",
        "TaskRecord",
    ),
    "perdure.streaming": (
        "StreamingResult",
        "TextChunk",
        "collect_stream",
    ),
    "perdure.submission": ("Submission",),
    "perdure.task": (
        "Attachment",
        "Message",
        "Recovery",
        "Result",
        "Task",
        "TaskConstraints",
        "TaskStatus",
        "TaskType",
        "Tool",
        "ToolCall",
        "Usage",
    ),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'perdure' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
