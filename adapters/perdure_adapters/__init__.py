"""The platforms that come with perdure, one a file, and the base for others.

Importing this imports no SDK: each adapter does that when it is first used.
"""

from __future__ import annotations

from perdure_adapters.base import AsyncBasePlatformAdapter, BasePlatformAdapter
from perdure_adapters.chatgpt import ChatGPTAdapter
from perdure_adapters.claude import ClaudeAdapter
from perdure_adapters.claude_code import ClaudeCodeAdapter
from perdure_adapters.compatible import CompatibleAdapter
from perdure_adapters.demo import DemoAdapter
from perdure_adapters.gemini import GeminiAdapter

__all__ = [
    "AsyncBasePlatformAdapter",
    "BasePlatformAdapter",
    "ChatGPTAdapter",
    "ClaudeAdapter",
    "ClaudeCodeAdapter",
    "CompatibleAdapter",
    "DemoAdapter",
    "GeminiAdapter",
]
