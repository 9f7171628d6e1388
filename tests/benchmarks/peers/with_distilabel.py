"""Chains of three turns with distilabel, in its own environment: python with_distilabel.py TASK.json URL CHAINS"""

import json
import sys
from pathlib import Path

from distilabel.models.llms import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts, StepInput, step
from distilabel.steps.tasks import ChatGeneration


@step(inputs=["messages", "generation", "critique"], outputs=["messages"])
def criticise(inputs: StepInput):
    for row in inputs:
        row["messages"] = continued(row, row["critique"])
    yield inputs


@step(inputs=["messages", "generation", "revision"], outputs=["messages"])
def revise(inputs: StepInput):
    for row in inputs:
        row["messages"] = continued(row, row["revision"])
    yield inputs


def continued(row: dict, request: str) -> list:
    return [
        *row["messages"],
        {"role": "assistant", "content": row["generation"]},
        {"role": "user", "content": request},
    ]


def main() -> None:
    task, url, chains = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])
    texts = {"critique": task["critique"], "revision": task["revision"]}
    rows = [{"messages": [{"role": "user", "content": p}]} | texts for p in task["prompts"][:chains]]
    batch = task["in_flight"]

    def generation(name: str) -> ChatGeneration:
        llm = OpenAILLM(
            model=task["model"],
            base_url=f"{url}/v1",
            api_key="none",
            timeout=600,
            generation_kwargs={"max_new_tokens": task["max_tokens"], "temperature": task["temperature"]},
        )
        return ChatGeneration(name=name, llm=llm, input_batch_size=batch, add_raw_output=False, add_raw_input=False)

    with Pipeline(name="chains") as pipeline:
        (
            LoadDataFromDicts(data=rows, batch_size=batch)
            >> generation("answer")
            >> criticise(input_batch_size=batch)
            >> generation("criticism")
            >> revise(input_batch_size=batch)
            >> generation("rewriting")
        )
    made = pipeline.run(use_cache=False)["default"]["train"]
    Path("out").mkdir()
    with Path("out/chains.jsonl").open("w") as file:
        for row in made:
            if row["generation"] is None:
                raise SystemExit("a generation failed")
            file.write(json.dumps({"messages": row["messages"], "revision": row["generation"]}) + "\n")


if __name__ == "__main__":
    main()
