"""The model card: what a folder holds, for readers and for the hub's index."""

from dataclasses import dataclass

import yaml

CARD = "README.md"
LIBRARY = "helmholtz"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a card says. What only a run knows is None for a bare checkpoint."""

    architecture: str
    parameters: int
    max_seq_len: int
    vocab_size: int
    text: str
    """Something that its tokenizer reads."""
    license: str
    exported_by: str
    """Commit."""
    is_bound: bool
    """Whether bits per byte are an upper bound: the likelihood of a latent plan's model is not known."""
    data: str | None
    """Name of the training data."""
    tokens: int | None
    """Training tokens."""
    trained_by: str | None
    """Commit."""
    bits_per_byte: float | None
    """Of the weights, on the part of the validation text that training watched."""


def model_card(facts: ModelFacts, name: str) -> str:
    """Markdown with a YAML head; ``name`` is the folder's."""
    head = {
        "license": facts.license,
        "library_name": LIBRARY,
        "pipeline_tag": "text-generation",
        "tags": [LIBRARY, facts.architecture, "free-energy"],
    }
    trained = "" if facts.data is None else f", trained on `{facts.data}`"
    story = f"A language model of helmholtz, architecture `{facts.architecture}`{trained}."
    parts = (f"# {name}", story, _table(facts), _loading(name, facts.text))
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n" + "\n\n".join(parts)


def _table(facts: ModelFacts) -> str:
    bound = " (upper bound)" if facts.is_bound else ""
    rows = {
        "architecture": facts.architecture,
        "parameters": f"{facts.parameters:,}",
        "vocabulary": f"{facts.vocab_size:,}",
        "longest sequence": f"{facts.max_seq_len:,} tokens",
        "training data": facts.data,
        "training tokens": None if facts.tokens is None else f"{facts.tokens:,}",
        f"validation bits per byte as training measured it{bound}": (
            None if facts.bits_per_byte is None else f"{'≤ ' * facts.is_bound}{facts.bits_per_byte:.4f}"
        ),
        "trained by commit": facts.trained_by,
        "exported by commit": facts.exported_by,
        "licence": facts.license,
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _loading(name: str, text: str) -> str:
    return f"""\
## Loading

```python
# pip install 'helmholtz-nn[hf]'
from transformers import AutoModelForCausalLM, AutoTokenizer

from helmholtz.interop.hf import register

register()
model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
prompt = tokenizer("<|endoftext|>{text}", return_tensors="pt", split_special_tokens=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

A document begins after the end of another: hence the token before the prompt. The model of helmholtz itself is
`helmholtz.interop.hf.from_hf("{name}")`.

## Training

`helmholtz.interop.hf.HelmholtzTrainer` is the `Trainer` of transformers for these models: weight decay acts on weight
matrices alone. `Trainer` itself would also decay what is stored under other names (decay rates, temperatures, queries,
memory patterns); with it, set `weight_decay=0` or give `optimizers=(AdamW(parameter_groups(model, 0.1)), None)` with
`helmholtz.training.optim.parameter_groups`. Pads have a token of their own, so a collator keeps the end of a text among
the labels.
"""
