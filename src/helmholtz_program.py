"""The program ``helmholtz``: an interruption while torch is being imported is told in one line, as any later one."""

import sys


def main() -> int:
    try:
        from helmholtz.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("helmholtz: interrupted\n")
        return 130
    return run()
