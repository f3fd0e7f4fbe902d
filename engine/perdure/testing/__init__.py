"""For tests: a platform that follows a script, and the suite that every adapter has to pass.

`ScriptedAdapter` plays a sequence of steps and remembers what was asked of it. `AdapterContract`
holds an adapter to the rules of `perdure.adapter`; whoever writes an adapter inherits it::

    class TestMyAdapter(AdapterContract):
        def make_adapter(self):
            return MyAdapter(base_url=server.url, api_key="secret-key")

        def endless(self):
            return Call(task=Task(prompt="Count to a million."), task_id="t")

        def failures(self):
            return [(RateLimited, Call(task=Task(prompt="answer with a 429"), task_id="t"))]

It needs no plug-in: its tests are ordinary functions, each with an event loop of its own. A server
that they talk to therefore runs in a thread or process of its own.
"""

from __future__ import annotations

from perdure.testing.contract import AdapterContract
from perdure.testing.scripted import Hold, ScriptedAdapter, Step

__all__ = ["AdapterContract", "Hold", "ScriptedAdapter", "Step"]
