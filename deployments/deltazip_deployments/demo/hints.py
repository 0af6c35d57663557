"""Commands to paste for asking the server that ``--keep`` leaves running."""

import json

from deltazip_deployments.demo.pipeline import Questions
from deltazip_deployments.demo.tasks import TASKS


def hints(url: str, questions: Questions) -> str:
    """The variants' tasks, a curl command, and a snippet for the ``openai`` client."""
    examples = [(task, questions[task.name][0]) for task in TASKS]
    width = max(len(task.name) for task in TASKS)
    lines = [f"  {task.name:{width}}  {task.does}: {example.question} → {example.answer}" for task, example in examples]
    task, example = examples[0]
    body = {"model": task.name, "messages": [{"role": "user", "content": example.question}], "temperature": 0}
    task, example = examples[-1]
    snippet = f"""\
python - <<'EOF'
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
chat = [{{"role": "user", "content": {example.question!r}}}]
for chunk in client.chat.completions.create(model={task.name!r}, messages=chat, temperature=0, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
EOF"""
    return "\n".join(
        [
            f"The server is up at {url} until you press Ctrl-C. Put a variant into `model`:",
            *lines,
            "",
            f"curl -s {url}/v1/chat/completions -H 'content-type: application/json' -d '{json.dumps(body)}'",
            "",
            "pip install openai",
            snippet,
        ]
    )
