"""``helmholtz kernels``."""

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
    from helmholtz.kernels.build import build, compiler, library_file

    parser = make_parser("kernels", DESCRIPTION)
    parser.add_argument("action", type=str, nargs="?", default="show", help=" or ".join(CHOICES))
    action = parse(parser, arguments)["action"]
    check_choice("action", action, CHOICES)
    if action == "build":
        there = library_file().is_file()
        if not there:
            console.print("compiling, about a minute")
        console.print(f"{build()}: {'was built before' if there else 'built'}")
        return 0
    file, reason = library_file(), kernels.refusal()
    console.print(f"library    {file}{'' if file.is_file() else ' (not built)'}")
    console.print(f"compiler   {compiler() or 'none found'}")
    console.print(f"kernels    {', '.join(kernels.NAMES)}")
    console.print(f"CPU        {'the kernels' if reason is None else f'plain forms: {reason}'}")
    console.print("elsewhere  plain forms")
    return 0
