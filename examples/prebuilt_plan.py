"""A plan written by hand: what runs at the same time, what waits, and what a failure leads to.

    python prebuilt_plan.py
    python prebuilt_plan.py --resume KEY    # after Ctrl-C, or kill -9 at any moment; the first line shows the key

Small objects stand in for the models, so it needs no key.
"""

import asyncio

from harness import AgentConfig, AgentRuntime, Plan, Task


class Model:
    """Any object with `complete` is a model; see three_agents.py for one that calls tools."""

    async def complete(self, system, messages, **kw):
        """Answer after a moment: unsure at first about the numbers, and unable to reach the press."""
        await asyncio.sleep(0.3)
        asked = messages[0]["content"]
        if "Results:" in asked:  # the synthesiser's question
            return '{"answer": "A good year, without echo in the press.", "confidence": 0.8}'
        task = asked.splitlines()[0]
        if "press" in task:
            raise RuntimeError("no connection to the press archive")
        sure = 0.3 if "numbers" in task and "earlier attempt" not in asked else 0.9
        return {"thought": "", "action": "finish", "answer": f"done: {task}", "confidence": sure}


plan = Plan(
    (
        # These three start at once. An answer below the confidence threshold (0.6) counts as a failure.
        Task("numbers", "analyst", "Sum the numbers up.", on_failure="retry", max_retries=1),
        Task("press", "reader", "Read the press.", on_failure="skip"),  # the report can do without it
        Task("staff", "reader", "Ask the staff.", on_failure="abort"),  # the run cannot
        # It starts when all it depends on has ended, and is given their results.
        Task("report", "analyst", "Write the report.", depends_on=("numbers", "press", "staff")),
    ),
    rationale="three sources, one report",
)
runtime = AgentRuntime(llm=Model(), agents=[AgentConfig("analyst"), AgentConfig("reader", allowed_tools=())])


async def main() -> None:
    async with runtime, runtime.run_plan_stream(plan, goal="How was the year?") as events:
        async for event in events:
            match event.type:
                case "STARTED" | "RESUMED":
                    print(event.type, "key", event.run_id, flush=True)
                case "TASK_STARTED":
                    print("TASK_STARTED", event.payload["task_id"], "attempt", event.payload["attempt"], flush=True)
                case "TASK_DONE":
                    how = event.error or f"{event.payload['answer']} (confidence {event.payload['confidence']})"
                    print("TASK_DONE", event.payload["task_id"], "-", how, flush=True)
                case "DONE":
                    for name, task in event.payload["task_results"].items():
                        print("  ", name, task["status"], "after", task["attempts"])
                    print("DONE", event.payload["answer"])


asyncio.run(main())
