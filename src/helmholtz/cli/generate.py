"""``helmholtz generate``."""

import sys

from rich.console import Console

from helmholtz.cli.arguments import make_parser, parse
from helmholtz.cli.checkpoints import add_checkpoint
from helmholtz.data.tokenizer import AbstractTokenizer
from helmholtz.evals.checkpoints import open_checkpoint
from helmholtz.models.generation import SamplingSettings, generate

DESCRIPTION = "Continue a prompt; the text appears as it is sampled."
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Prints a prompt and the tokens after it as they come; a character that is not whole yet waits for its bytes."""

    def __init__(self, tokenizer: AbstractTokenizer, console: Console, prompt: str) -> None:
        self.tokenizer, self.console, self.prompt = tokenizer, console, prompt
        self.tokens: list[int] = []
        self.printed = 0

    def __call__(self, row: int, token: int) -> None:
        self.tokens.append(token)
        self._print(self.prompt + self.tokenizer.decode(self.tokens).rstrip(REPLACEMENT))

    def end(self) -> None:
        self._print(self.prompt + self.tokenizer.decode(self.tokens))
        self.console.print()

    def _print(self, text: str) -> None:
        self.console.print(text[self.printed :], end="")
        self.printed = max(self.printed, len(text))


def standard_input() -> str:
    """Its text, which is UTF-8 whatever the locale; the byte-order mark that some pipes begin with is no text.

    Raises: ValueError naming the first byte that is not UTF-8.
    """
    try:
        return sys.stdin.buffer.read().decode().removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input: not UTF-8 at byte {error.start} ({error.reason})") from error


def run(arguments: list[str], console: Console) -> int:
    parser = make_parser("generate", DESCRIPTION)
    add_checkpoint(parser)
    parser.add_argument("--prompt", type=str, default=None, help="text to continue; default: standard input")
    parser.add_class_arguments(SamplingSettings, "sampling", skip={"stop_tokens"})
    values = parse(parser, arguments)
    checkpoint = open_checkpoint(values["checkpoint"])
    prompt = standard_input() if values["prompt"] is None else values["prompt"]
    settings = SamplingSettings(**values["sampling"], stop_tokens=(checkpoint.tokenizer.eos_id,))
    stream = TextStream(checkpoint.tokenizer, console, prompt)
    generate(checkpoint.model, [checkpoint.document(prompt)], settings, callback=stream)
    stream.end()
    return 0
