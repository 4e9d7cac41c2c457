"""Studies called as from a shell."""

from helmholtz.cli.main import main


def call_study(capsys, *arguments):
    """Exit code, output and errors of ``helmholtz study ...``."""
    code = main(["study", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err
