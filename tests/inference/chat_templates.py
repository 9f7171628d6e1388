"""Small chat templates, each of which behaves as those of a family of models do. They use the packaged model's tokens."""

from __future__ import annotations

_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

PLAIN = f"{{% for m in messages %}}{_TURN}{{% endfor %}}{_PROMPT}"

# No system turn; the model's role has a name of its own.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)

# Turns must alternate, no answer may be empty, and the system text stands in the last user turn.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}"
    "{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ system + '\n\n' if system and loop.last else '' }}{{ m.content }} [/INST]"
    "{% elif not m.content %}{{ raise_exception('An assistant message must have content') }}"
    "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)

# A system text of its own, with the date of the day.
LLAMA3 = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<|im_start|>system\nThis model knows the world until December 2023.\nThe date is {{ date_string }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "<|im_end|>\n" + PLAIN
)

# Thinks unless it is told not to; thoughts of earlier turns are cut, the last turn gets an empty one.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<think>\n\n</think>\n\n' if loop.last else '' }}{{ text }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)

# Always thinks: the prompt opens the thought.
R1 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)

# Channels: what the model thinks in one, what it says in another.
HARMONY = (
    "<|im_start|>system<|message|>You are a language model.\nReasoning: {{ reasoning_effort | default('medium') }}"
    "<|end|>{% for m in messages %}<|im_start|>{{ 'developer' if m.role == 'system' else m.role }}"
    "{{ '<|channel|>final' if m.role == 'assistant' else '' }}<|message|>{{ m.content }}<|im_end|>"
    "{# thoughts came in <|channel|>analysis #}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)

# Leaves system turns out without a word.
DEAF = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")

# Shows the model the last turn alone.
FORGETFUL = PLAIN.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")

# Of one's own: shows tools; and one that wants user and assistant to alternate.
KNOWS_TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EACH = "{% for m in messages %}"
ALTERNATES = KNOWS_TOOLS.replace(
    EACH, EACH + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
)
