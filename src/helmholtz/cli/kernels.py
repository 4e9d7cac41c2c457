"""``helmholtz kernels``."""

import sys

from rich.console import Console

from helmholtz._checks import check_choice
from helmholtz.cli.arguments import make_parser, parse

DESCRIPTION = (
    "What is built for this torch and this kind of processor, and what runs. build compiles the kernels with the C++ "
    "compiler at hand (or CXX), once; without them every operation is made of torch's own."
)
CHOICES = ("show", "build")


def run(arguments: list[str], console: Console) -> int:
    from helmholtz import kernels
    from helmholtz.kernels.build import compiler, find_library, library_file

    parser = make_parser("kernels", DESCRIPTION)
    parser.add_argument("action", type=str, nargs="?", default="show", help=" or ".join(CHOICES))
    action = parse(parser, arguments)["action"]
    check_choice("action", action, CHOICES)
    if action == "build":
        return _build(console)
    reason, command = kernels.refusal(), compiler()
    try:
        library = f"{library_file()}{'' if find_library() else ' (not built)'}"
    except ValueError as error:
        library = str(error)
    console.print(f"library    {library}")
    console.print(f"compiler   {' '.join(command) if command else 'none found'}")
    console.print(f"kernels    {', '.join(kernels.NAMES)}")
    console.print(f"CPU        {'the kernels' if reason is None else f'plain forms: {reason}'}")
    names = f"triton for {', '.join(kernels.gpu.MODULES)}; plain forms for the rest"
    console.print(f"GPU        {names if kernels.gpu.PRESENT else 'plain forms'}")
    return 0


def _build(console: Console) -> int:
    from helmholtz.kernels.build import BuildError, build, compiler, find_library

    there = find_library()
    if not there and compiler():
        console.print("compiling, about a minute")
    try:
        file = build()
    except BuildError as error:
        sys.stderr.write(f"{error.complaint}\n")
        raise
    console.print(f"{file}: {'was built before' if there else 'built'}")
    return 0
