"""Safe loading of untrusted YAML: only plain YAML is accepted.

Size and depth are limited. Aliases, with which a few lines can expand to gigabytes, and tags are refused before any
value is constructed.
"""

from __future__ import annotations

from typing import Any

import yaml


class _UniqueKeys(yaml.CSafeLoader):
    """A loader that refuses a mapping with the same key twice: YAML takes the last one, and the first is lost."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _check_keys(node, set())
        return node


def _check_keys(node: yaml.Node, checked: set[int]) -> None:
    """Raise yaml.YAMLError if a mapping below a node has a key twice. Merge keys (`<<`) may come several times."""
    if id(node) in checked:  # an alias
        return
    checked.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, checked)
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if line := seen.get((key.tag, key.value)):
                    problem = f"the key '{key.value}' is there twice, first in line {line}"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen[key.tag, key.value] = key.start_mark.line + 1
            _check_keys(key, checked)
            _check_keys(value, checked)


LARGEST, DEEPEST = 200_000, 20  # characters, and levels of brackets and indentation


def load_plain_yaml(text: str, largest: int = LARGEST, deepest: int = DEEPEST) -> Any:
    """Return the value. ValueError with a readable message for invalid or non-plain YAML."""
    if len(text) > largest:
        raise ValueError(f"it has {len(text):,} characters, at most {largest:,} are read")
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.CSafeLoader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has YAML aliases, expected every value written out")
            if isinstance(event, (yaml.ScalarEvent, yaml.CollectionStartEvent)) and event.tag is not None:
                raise ValueError(f"it has a YAML tag ({event.tag:.60}), expected plain values")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > deepest:
                raise ValueError(f"it is nested more than {deepest} deep")
        return yaml.load(text, Loader=_UniqueKeys)  # the same parser as above, so both passes agree
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        location = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(
            f"not valid YAML: {getattr(e, 'problem', None) or ' '.join(str(e).split())[:200]}{location}"
        ) from None
    except (LookupError, AttributeError, TypeError, OverflowError, RecursionError) as e:  # errors of the loader itself
        raise ValueError(f"not valid YAML: {type(e).__name__}: {e}"[:200]) from None


def load_own_yaml(text: str) -> Any:
    """Return the value of the user's own YAML; yaml.YAMLError for invalid YAML and for a key that is there twice."""
    return yaml.load(text, Loader=_UniqueKeys)
