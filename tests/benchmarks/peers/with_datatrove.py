"""Chains of three turns with datatrove, in its own environment: python with_datatrove.py TASK.json URL CHAINS"""

import json
import sys
from pathlib import Path

from datatrove.data import Document
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.writers import JsonlWriter

TASK, URL, CHAINS = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2], int(sys.argv[3])


async def chain(document: Document, generate) -> list:
    messages = [{"role": "user", "content": document.text}]
    for request in (TASK["critique"], TASK["revision"], None):
        settings = {"max_tokens": TASK["max_tokens"], "temperature": TASK["temperature"]}
        result = await generate({"messages": messages, **settings})
        messages = [*messages, {"role": "assistant", "content": result.text}]
        if request:
            messages = [*messages, {"role": "user", "content": request}]
    return messages


def main() -> None:
    documents = [Document(text=prompt, id=str(n)) for n, prompt in enumerate(TASK["prompts"][:CHAINS])]
    config = InferenceConfig(
        server_type="endpoint",
        model_name_or_path=TASK["model"],
        endpoint_url=URL,
        max_concurrent_generations=TASK["in_flight"],
        request_timeout=600,
    )
    runner = InferenceRunner(rollout_fn=chain, config=config, output_writer=JsonlWriter("out", compression=None))
    LocalPipelineExecutor(pipeline=[documents, runner], logging_dir="log").run()


if __name__ == "__main__":
    main()
