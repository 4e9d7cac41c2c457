"""The program ``helmholtz``: what ends it while torch and the kernels are loaded is told in one line, as all later."""

import sys


def main() -> int:
    try:
        from helmholtz.cli.main import main as run
    except KeyboardInterrupt:
        sys.stderr.write("helmholtz: interrupted\n")
        return 130
    except (ValueError, OSError) as error:  # HELMHOLTZ_KERNELS, or a library of kernels that cannot be loaded
        sys.stderr.write(f"helmholtz: error: {' '.join(str(error).split())}\n")
        return 2
    return run()
