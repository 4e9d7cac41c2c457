import json

import pytest

from helmholtz.cli.main import main
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.plan_file import load_plan, model_fingerprint
from helmholtz.models.checkpoint import save_checkpoint
from helmholtz.models.transformer import Transformer, TransformerConfig
from plan_cases import ruled_by_its_plan

VOCABULARY = ByteTokenizer.vocab_size


@pytest.fixture(scope="module")
def model():
    return ruled_by_its_plan(vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans") / "checkpoint"
    save_checkpoint(model, folder)
    ByteTokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture
def plan(checkpoint, capsys):
    """Call the command; its exit code, output and errors."""

    def call(*arguments):
        code = main(["plan", f"--checkpoint={checkpoint}", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def sample(plan):
    """Groups of few and short samples, as JSON."""

    def call(*arguments):
        sizes = ["--sampling.max_new_tokens=8", "--n_samples=3", "--n_plans=2", "--json"]
        code, out, err = plan("--prompt=to be", *sizes, *arguments)
        assert code == 0, err
        return json.loads(out)

    return call


def codes_of(result, name):
    (group,) = (group for group in result["groups"] if group["name"] == name)
    return [sample["codes"] for sample in group["samples"]]


def test_a_text_is_encoded_shown_and_saved(plan, model, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = plan("--encode=to be", f"--save={file}")
    assert code == 0
    saved = load_plan(file, model)
    assert saved.texts == ("<end>", "t", "o", " ", "b", "e")
    assert saved.tokens == (256, *b"to be")
    assert saved.fingerprint == model_fingerprint(model)
    lines = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert [int(line[3]) for line in lines] == list(saved.codes)
    assert [sum(int(bit) << h for h, bit in enumerate(line[4].strip())) for line in lines] == list(
        saved.codes
    )
    assert f"wrote {file}" in out
    result = json.loads(plan("--encode=to be", "--json")[1])
    assert result["codes"] == list(saved.codes)
    for line, probability in zip(lines, result["probability"], strict=True):
        assert [int(p) for p in line[5].split()] == pytest.approx([100 * p for p in probability], abs=0.51)
    assert json.loads(plan("--encode=to be", "--json", "--plan_seed=1")[1])["codes"] != list(saved.codes)


def test_an_encoded_plan_is_held_then_edited(plan):
    before = json.loads(plan("--encode=to be", "--json")[1])["codes"]
    changes = ["--hold=1=1", "--hold=4=0", "--edit=2:1=0", "--edit=3=21"]
    after = json.loads(plan("--encode=to be", "--json", *changes)[1])["codes"]
    wanted = [(code | 2) & 15 for code in before]
    wanted[2] &= ~2
    wanted[3] = 21
    assert after == wanted


def test_samples_share_what_the_plan_decides(sample, plan, tmp_path):
    result = sample()
    assert result["one_plan"]["agreement"]["mean"] > 0.9 > result["a_plan_each"]["agreement"]["mean"] + 0.3
    assert result["one_plan"]["agreement"]["n"] == result["n_plans"] == 2
    assert [group["name"] for group in result["groups"]] == ["independent plans", "plan A", "plan B"]
    a, b = codes_of(result, "plan A"), codes_of(result, "plan B")
    assert a == a[:1] * 3 and b == b[:1] * 3 and a != b
    assert len({tuple(codes) for codes in codes_of(result, "independent plans")}) == 3
    assert sample() == result
    assert codes_of(sample("--plan_seed=5"), "plan A") != a
    picture = tmp_path / "plans.png"
    code, out, _ = plan(
        "--prompt=to be", "--sampling.max_new_tokens=8", "--n_samples=3", "--n_plans=2", "--bit_effects",
        f"--picture={picture}",
    )  # fmt: skip
    assert code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = result["one_plan"]["agreement"]
    assert f"{100 * shown['mean']:.1f} ± {100 * shown['standard_error']:.1f}" in out
    for part in ("2 groups of 3 samples of each kind", "plan B", "A bit 1 in all codes against 0, 2 pairs"):
        assert part in out
    assert f"  1  to be{result['groups'][1]['samples'][0]['text']}".split("\n")[0] in out


def test_a_saved_plan_is_used_for_another_prompt(sample, plan, tmp_path):
    file = tmp_path / "plan.json"
    saved = json.loads(plan("--encode=the question", f"--save={file}", "--json")[1])["codes"]
    result = sample(f"--plan={file}")
    n_codes = 1 + len("to be") + 8
    assert len(saved) == 13 and n_codes == 14
    for name in ("plan A", "plan B"):
        assert all(codes[:13] == saved[: len(codes)] for codes in codes_of(result, name))
    assert codes_of(result, "independent plans") == codes_of(sample(), "independent plans")
    _, out, _ = plan(
        "--prompt=to be", f"--plan={file}", "--sampling.max_new_tokens=3", "--n_samples=2", "--n_plans=2"
    )
    assert f"plan: 9 of 9 codes from {file}, which has 13" in out


def test_an_edit_is_shown_beside_the_plan_it_changes(sample):
    result = sample("--edit=7:0=1", "--edit=7:1=1", "--edit=8=3", "--edit=9=3")
    plain = sample()
    assert [group["name"] for group in result["groups"]] == ["independent plans", "plan A", "plan A, edited"]
    (before, *_), (after, *_) = codes_of(result, "plan A"), codes_of(result, "plan A, edited")
    assert before == codes_of(plain, "plan A")[0]
    assert after == [*before[:7], before[7] | 3, 3, 3, *before[10:]]
    assert result["one_plan"] == plain["one_plan"]
    assert result["changed_by_edit"]["n"] == 3
    assert 0 < result["changed_by_edit"]["mean"] <= 6 / 8  # two tokens come before the first edited code


def test_held_bits_are_held_in_every_code_that_is_drawn(sample):
    result = sample("--hold=0=1", "--hold=3=0")
    for name in ("independent plans", "plan A", "plan B"):
        assert all(code & 0b1001 == 1 for codes in codes_of(result, name) for code in codes)


def test_the_prompt_is_planned_by_whom_it_says(sample):
    posterior, prior = sample(), sample("--prompt_plan=prior")
    assert posterior == sample("--prompt_plan=posterior")
    for name in ("plan A", "plan B"):
        first, second = codes_of(posterior, name)[0], codes_of(prior, name)[0]
        assert first[:6] != second[:6]
        assert first[6:] == second[6:]


def test_bits_are_measured(sample):
    effects = sample("--bit_effects")["changed_by_bit"]
    assert len(effects) == 5
    assert all(effect["n"] == 2 and effect["mean"] > 0.3 for effect in effects)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "encode and prompt: wanted one of them"),
        (["--encode=a", "--prompt=a"], "encode and prompt: wanted one of them"),
        (["--encode=a", "--plan=x.json"], "plan and encode: plan has no meaning here"),
        (["--encode=a", "--prompt_plan=prior"], "prompt_plan and encode"),
        (["--encode=a", "--n_samples=7"], "n_samples and encode"),
        (["--encode=a", "--n_plans=7"], "n_plans and encode"),
        (["--encode=a", "--bit_effects"], "bit_effects and encode"),
        (["--encode=a", "--picture=x.png"], "picture and encode"),
        (["--encode=a", "--sampling.seed=7"], "sampling.seed and encode"),
        (["--prompt=a", "--save=x.json"], "save and prompt: save has no meaning here"),
        (["--encode="], "encode must be a text that is not empty, got ''"),
        (["--encode", "a" * 64], "a sequence of 65 tokens is longer than max_seq_len=64"),
        (["--encode=a", "--edit=0:1"], "edit must be POSITION:BIT=VALUE or POSITION=CODE, whole numbers, got '0:1'"),
        (["--encode=a", "--edit=2=1"], "position must be in [0, 2), the plan, got 2"),
        (["--encode=a", "--edit=0:5=1"], "bit must be in [0, 5), got 5"),
        (["--encode=a", "--edit=0:1=2"], "value of bit 1 must be 0 or 1, got 2"),
        (["--encode=a", "--hold=1"], "hold must be BIT=0 or BIT=1, got '1'"),
        (["--encode=a", "--hold=1=2"], "hold must be BIT=0 or BIT=1, got '1=2'"),
        (["--prompt=a", "--hold=5=1"], "hold must be of a bit below the model's 5, got '5=1'"),
        (["--prompt=a", "--hold=1=1", "--hold=1=0"], "hold must be one value for bit 1"),
        (["--prompt=a", "--plan_seed=-1"], "plan_seed must be an integer of at least 0, got -1"),
        (["--prompt=a", "--prompt_plan=best"], "prompt_plan"),
        (["--prompt=a", "--plan=nowhere.json"], "nowhere.json: No such file or directory"),
        (["--prompt=a", "--n_samples=1"], "n_samples must be an integer of at least 2, got 1"),
        (["--prompt=a", "--n_plans=1"], "n_plans must be an integer of at least 2, got 1"),
        (["--prompt=a"], "max_new_tokens=128 exceed max_seq_len=64"),
        (["--prompt=a", "--sampling.max_new_tokens=2", "--edit=4=1"], "position must be in [0, 4), the plan, got 4"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line_and_exit_code_2(plan, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = plan(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("helmholtz plan: error: ") and err.count("\n") == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_bits_cannot_be_held_where_all_codes_are_given(plan, tmp_path):
    file = tmp_path / "plan.json"
    assert plan("--encode=to be or not to be", f"--save={file}")[0] == 0
    arguments = ["--prompt=to be", "--sampling.max_new_tokens=8", f"--plan={file}", "--hold=1=1"]
    code, _, err = plan(*arguments)
    assert code == 2
    assert f"hold and plan: {file} gives all 14 codes and none is drawn; change them with --edit" in err
    assert plan(*arguments[:1], "--sampling.max_new_tokens=30", *arguments[2:])[0] == 0


def test_a_model_without_plans_is_refused_by_name(tmp_path, capsys):
    config = TransformerConfig(vocab_size=VOCABULARY, d_model=16, n_layers=1, n_heads=2)
    save_checkpoint(Transformer(config), tmp_path)
    ByteTokenizer().save(tmp_path / "tokenizer")
    assert main(["plan", f"--checkpoint={tmp_path}", "--encode=a"]) == 2
    message = capsys.readouterr().err
    assert "checkpoint: the transformer in" in message and "has no plan" in message
