"""YAML documents on the command line: read once, strictly, and without importing anything."""

import os
import re
from collections.abc import Collection
from typing import Any

import yaml
from jsonargparse import set_loader, set_parsing_settings

MAX_CHARACTERS, MAX_NODES, MAX_DEPTH = 4_000_000, 100_000, 50
"""Of a document; what an alias stands for counts each time, for a few lines of aliases can stand for gigabytes."""

FLOAT = re.compile(r"[-+]?(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))(?:[eE][-+]?\d+)?$"
                   r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$")  # fmt: skip


class _Resolver(yaml.resolver.Resolver):
    """Numbers as in YAML 1.2 (``1e-3`` is one), and dates as text."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith((":timestamp", ":float"))]
        for first, found in yaml.resolver.Resolver.yaml_implicit_resolvers.items()
    }


_Resolver.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))


class _Loader(_Resolver, yaml.SafeLoader):
    pass


class _Dumper(_Resolver, yaml.SafeDumper):
    """Writes what ``_Loader`` reads back as it was."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises: yaml.YAMLError, also for a key given twice and for what is boundless."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets within brackets
        raise yaml.YAMLError(str(error)) from error
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = (MAX_NODES, MAX_DEPTH)  # what a node that holds itself meets
    inner = list(node.value) if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys_once(node)
        inner = [part for pair in inner for part in pair]
    found = [_measure(part, known) for part in inner]
    size, depth = 1 + sum(n for n, _ in found), 1 + max((d for _, d in found), default=0)
    if size > MAX_NODES or depth > MAX_DEPTH:
        wanted = f"at most {MAX_NODES:,} values, nested at most {MAX_DEPTH} deep"
        raise yaml.MarkedYAMLError(problem=f"wanted {wanted}", problem_mark=node.start_mark)
    known[id(node)] = (size, depth)
    return size, depth


def _check_keys_once(node: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and not key.tag.endswith(":merge"):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                text = f"key {key.value!r} is given twice, in line {lines[name]} and in line {line}"
                raise yaml.MarkedYAMLError(problem=text)
            lines[name] = line


# Options are parsed by the same rules. A value can name a class of any module ("class_path"), and parsing would import
# it, from the current folder too. No option of ours takes a class; parsing a config inside a list imports ours by name.
set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["helmholtz"])


class Document(str):
    """A document as the value of ``--config``: its text, what it says, and where it is from."""

    content: dict[Any, Any]
    source: str

    @classmethod
    def read(cls, option: str, file: str) -> "Document":
        """The document in ``file``, or the mapping that stands in its place, below the names in ``option``.

        Raises: ValueError naming option and file if there is no mapping.
        """
        inline = file.lstrip().startswith("{")
        source = option if inline else f"{option} {file or repr(file)}"
        try:
            content = load_yaml(file if inline else _read(file))
        except OSError as error:
            raise ValueError(f"{source}: {error.strerror}") from error
        except (yaml.YAMLError, ValueError) as error:  # no YAML, or no UTF-8
            raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            got = "nothing" if content is None else type(content).__name__
            raise ValueError(f"{source}: wanted a mapping of names to values, got {got}")
        for name in reversed(option.removeprefix("--").split(".")):
            content = content if name == "config" else {name: content}
        text = yaml.dump(content, Dumper=_Dumper, default_flow_style=True, width=MAX_CHARACTERS)
        document = cls(text.strip())
        document.content, document.source = content, source
        return document


def _read(file: str) -> str:
    """Raises: ValueError if there is more than a person writes (a device may never end)."""
    with open(os.path.expanduser(file), encoding="utf-8") as opened:
        text = opened.read(MAX_CHARACTERS + 1)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"wanted at most {MAX_CHARACTERS:,} characters")
    return text


def read_documents(arguments: list[str], groups: Collection[str]) -> list[str]:
    """``arguments`` with the file of each ``--config FILE`` and ``--<group> FILE`` replaced by what is in it.

    A file is opened once, for a pipe can be read only once; documents that were read before stay.
    """
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, value = argument.partition("=")
        if not option.startswith("--") or option[2:] not in {"config", *groups}:
            result.append(argument)
            continue
        file = value if equals else next(rest, None)
        if file is None:  # for the parser to complain about
            result.append(argument)
        else:
            result += ["--config", file if isinstance(file, Document) else Document.read(option, file)]
    return result


def documents(arguments: list[str]) -> list[Document]:
    return [argument for argument in arguments if isinstance(argument, Document)]
