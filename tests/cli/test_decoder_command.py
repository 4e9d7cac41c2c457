"""A decoder of any layers from the command line: trained, inspected, sampled, refused in one line."""

import json

import pytest

from helmholtz.cli.main import main
from tiny_runs import prepare_text

TRAIN = [
    "--train.steps=2",
    "--train.batch_size=2",
    "--train.seq_len=16",
    "--train.warmup_steps=1",
    "--train.threads=1",
]
MODEL = ["--model.architecture=decoder", "--model.d_model=32", "--model.max_seq_len=32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("prepared"))


def run(data, folder, *options):
    words = [
        f"--data.folder={data.folder}",
        "--data.tokenizer=bytes",
        "--data.validation_fraction=0.1",
        f"--data.sources={json.dumps(list(data.sources))}",
    ]
    return main(["train", *words, f"--train.output_dir={folder}", *TRAIN, *MODEL, *options])


def test_a_key_of_a_mapping_is_given_on_its_own(data, tmp_path, capsys):
    file = tmp_path / "parts.yaml"
    file.write_text("model: {layers: 'mamba x2', plan: {layer: 1, n_bits: 2}}")
    options = ["--model.plan.layer=0", "--model.equilibrium.d_head", "16", "--model.equilibrium.n_patterns=8"]
    assert run(data, tmp_path / "run", f"--config={file}", *options) == 0
    capsys.readouterr()
    saved = json.loads((tmp_path / "run" / "last" / "config.json").read_text())["config"]
    assert (saved["plan"]["layer"], saved["plan"]["n_bits"]) == (0, 2)
    assert (saved["equilibrium"]["d_head"], saved["equilibrium"]["n_patterns"]) == (16, 8)


def test_a_pattern_with_a_plan_and_an_equilibrium(data, tmp_path, capsys):
    parts = ['--model.plan={"layer": 1, "n_bits": 3}', '--model.equilibrium={"d_head": 16, "n_patterns": 8}']
    layers = "--model.layers=attention, fem:gla x2, mamba"
    assert run(data, tmp_path / "run", layers, *parts, "--objective.kappa_bits=0.2") == 0
    saved = json.loads((tmp_path / "run" / "last" / "config.json").read_text())
    assert saved["architecture"] == "decoder"
    assert [layer["mixer"]["kind"] for layer in saved["config"]["layers"]] == [
        "attention",
        "fem",
        "fem",
        "mamba",
    ]
    capsys.readouterr()
    assert main(["inspect", f"--checkpoint={tmp_path / 'run'}", "--text=ab c"]) == 0
    shown = capsys.readouterr().out
    assert "fem, gla" in shown and "plan of 3 bits" in shown and "8 patterns" in shown
    assert (
        main(["generate", f"--checkpoint={tmp_path / 'run'}", "--prompt=a", "--sampling.max_new_tokens=2"])
        == 0
    )
    capsys.readouterr()


def test_layers_from_a_file(data, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {layers: [{mixer: {kind: fem, n_heads: 4, prior: linear}, d_ff: 24}, {mixer: {kind: mamba}}]}"
    )
    assert run(data, tmp_path / "run", f"--config={file}") == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.layers=fam"], "did you mean 'fem'?"),
        (
            ["--model.layers=[{mixer: {kind: mamba, d_sate: 4}}]"],
            "has no key 'd_sate'; did you mean 'd_state'?",
        ),
        (["--model.layers=mamba", "--objective.kappa_bits=0.2"], "objective.kappa_bits must be absent"),
        (["--model.layers=mamba", "--model.plan={layer: 1}"], "plan.layer must be at most 0"),
        ([], "layers must be a list, or a pattern: attention, fem:gla x3, got None"),
        (
            ["--model.layers=[{mixer: {kind: attention, n_heads: 2}}, {mixer: {kind: mamba, d_head: 7}}]"],
            "DecoderConfig.layers[1].mixer: d_head must divide d_inner",
        ),
        (["--model.layers=mamba", "--model.plan.n_bits=3"], "DecoderConfig.plan: layer is missing"),
        (["--model.layers=mamba", "--model.plan.layr=0"], "did you mean 'model.plan.layer'?"),
        (["--model.layers=mamba", "--model.plan=true"], "model.plan must be a mapping or null, got 'true'"),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, capsys, options, message):
    assert run(data, tmp_path / "run", *options) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
