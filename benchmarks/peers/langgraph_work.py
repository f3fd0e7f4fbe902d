"""LangGraph: a graph of one node, checkpointed in SQLite, a thread for each task."""

from __future__ import annotations

import asyncio
from typing import TypedDict

from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph
from work import answer, arguments, clients


class State(TypedDict):
    """What a task carries."""

    prompt: str
    output: str


async def node(state: State) -> dict[str, str]:
    """Answer."""
    return {"output": f"Sales rose: {state['prompt']}"}


async def main() -> None:
    """Warm up, then measure."""
    work = arguments()
    builder = StateGraph(State)
    builder.add_node("answer", node)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    async with AsyncSqliteSaver.from_conn_string(str(work.folder / "checkpoints.db")) as saver:
        graph = builder.compile(checkpointer=saver)

        async def one(number: int) -> None:
            config = {"configurable": {"thread_id": str(number)}}
            await graph.ainvoke({"prompt": f"Question {number}", "output": ""}, config)

        await one(-1)
        answer(await clients(work, one))


if __name__ == "__main__":
    asyncio.run(main())
