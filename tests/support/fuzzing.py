"""Calls of the command line that must end in a result or in one line, and junk to call it with."""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from helmholtz.cli.main import main


def examples(share: float = 1.0) -> settings:
    """A share of the examples that the chosen profile has: 50 in ``tests``, thousands in ``thorough``."""
    return settings(
        max_examples=max(5, int(settings().max_examples * share)),
        deadline=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Outcome:
    """One command in this process, which must succeed without a complaint or end with one line that says why."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    found = Outcome(code, out.getvalue(), err.getvalue())
    assert code in (0, 1, 2), found
    if code:
        assert found.err.count("\n") == 1, found
        head = f"helmholtz {arguments[0]}: " + "error: " * (code == 2)
        assert found.err.startswith(head) and len(found.err) > len(head) + 5, found
    else:
        assert not found.err, found
    return found


def snapshot(folder: Path) -> dict[Path, bytes]:
    """Contents of every file below ``folder``, hidden ones included."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NAME = st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), max_size=12)
"""No slash: a name of a file stays in the working directory."""
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, -(10**30)]),
    st.floats(),
    st.sampled_from([0.0, 0.1, 1e-3, 1e308, 5e-324]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, NAME, st.dates(), st.binary(max_size=6))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(NAME, NUMBERS, st.none()), inner, max_size=4)
    ),
    max_leaves=8,
)
"""Whatever YAML can say."""


@st.composite
def changed(
    draw: st.DrawFn, valid: dict[str, Any], values: st.SearchStrategy[Any] = VALUES
) -> dict[str, Any]:
    """A valid nested mapping in which one to three things were removed, replaced, renamed or added."""
    result = yaml.safe_load(yaml.safe_dump(valid))
    for _ in range(draw(st.integers(1, 3))):
        node = result
        while isinstance(node, dict) and node:
            key = draw(st.sampled_from(list(node)))
            if isinstance(node[key], dict) and draw(st.booleans()):
                node = node[key]
                continue
            _change(draw, node, key, values)
            break
    return result


def _change(draw: st.DrawFn, node: dict[Any, Any], key: Any, values: st.SearchStrategy[Any]) -> None:
    what = draw(st.sampled_from(["replace", "replace", "remove", "rename", "add"]))
    if what == "replace":
        node[key] = draw(values)
    elif what == "add":
        node[draw(NAME)] = draw(values)
    else:
        value = node.pop(key)
        if what == "rename":
            node[draw(NAME)] = value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Cut off, with a bit flipped, bytes overwritten, inserted or removed, or replaced as a whole."""
    what = draw(st.sampled_from(["cut", "flip", "flip", "overwrite", "insert", "remove", "replace"]))
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if draw(st.booleans()):  # where headers are
        at = min(at, draw(st.integers(0, 200)))
    junk = draw(st.binary(min_size=1, max_size=12))
    if what == "cut":
        return content[:at]
    if what == "flip" and content:
        flipped = content[at] ^ 1 << draw(st.integers(0, 7))
        return content[:at] + bytes([flipped]) + content[at + 1 :]
    if what == "overwrite":
        return content[:at] + junk + content[at + len(junk) :]
    if what == "insert":
        return content[:at] + junk + content[at:]
    if what == "remove":
        return content[:at] + content[at + len(junk) :]
    return draw(st.binary(max_size=60))
