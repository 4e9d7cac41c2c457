"""Studies called as from a shell, and a study that computes nothing but its seeds."""

from helmholtz.cli.main import main
from helmholtz.experiments.base import Study, add_seeds, make_table
from helmholtz.experiments.queue import QueuedRun


def call_study(capsys, *arguments):
    """Exit code, output and errors of ``helmholtz study ...``."""
    code = main(["study", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class Numbers(Study):
    name = "numbers"
    actions = {"run": "", "report": "", "list": ""}
    reported = ("run", "report")

    @classmethod
    def add_options(cls, parser, action):
        add_seeds(parser, "")

    def runs(self):
        return [QueuedRun(f"number-{seed}", {"seed": seed}) for seed in self.values["seeds"]]

    def compute(self, run, note):
        note(1, 2)
        return {"square": run.settings["seed"] ** 2}

    def report(self, done, missing, console):
        rows = [{"run": one.run.name, "square": str(one.result["square"])} for one in done]
        console.print(make_table("Squares", rows))
        self.write_summary(rows, done, missing)
