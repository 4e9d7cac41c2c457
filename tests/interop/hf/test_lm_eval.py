"""The numbers of lm-evaluation-harness are ours: both model types, on a task in a file, without a network."""

import contextlib
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

from decoder_cases import SIZES, liven
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.language import stream_nats
from helmholtz.evals.latent import evaluate_bounds
from helmholtz.interop.hf import export, register
from helmholtz.models.checkpoint import load_checkpoint, save_checkpoint
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of lm_eval and what it imports
]

TEXTS = [
    "the king shall speak of",
    "love, and war before the night falls\nupon his quiet house " * 3 + "and his quiet king",
]
CHOICES = [{"question": "the king", "choices": [" shall speak", " of love"], "answer": 0}] * 2
WINDOW = 32


def write_tasks(folder):
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    common = "dataset_path: json\ntest_split: test\nmetadata: {version: 1}\n"
    files = f"dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/%s.jsonl}}}}\n"
    (folder / "texts.yaml").write_text(
        f"task: tiny_texts\n{common}{files % 'texts'}"
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]\n"
    )
    (folder / "choices.yaml").write_text(
        f"task: tiny_choices\n{common}{files % 'choices'}"
        "output_type: multiple_choice\ndoc_to_text: question\ndoc_to_target: answer\ndoc_to_choice: choices\n"
        "metric_list: [{metric: acc}]\n"
    )
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def free_checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    sizes = SIZES | {"vocab_size": 257, "max_seq_len": WINDOW}
    model = liven(FreeTransformer(FreeTransformerConfig(**sizes, n_latent_bits=4)))
    folder = tmp_path_factory.mktemp("free") / "checkpoint"
    save_checkpoint(model, folder)
    ByteTokenizer().save(folder / "tokenizer")
    return folder


def evaluate(model, arguments, tasks, names, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import lm_eval
    from lm_eval.tasks import TaskManager

    import helmholtz.interop.hf.lm_eval  # noqa: F401  registers the model type

    register()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=names,
        task_manager=manager,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )


def streams():
    return [torch.tensor([256, *text.encode()]) for text in TEXTS]


def bits_per_byte(nats):
    return sum(nats) / math.log(2) / sum(len(text.encode()) for text in TEXTS)


def test_both_model_types_give_our_bits_per_byte(run_folder, exported, tasks, monkeypatch):
    model = load_checkpoint(run_folder / "best")
    # the last window of lm_eval reaches back for context: lengths of whole windows make both the same
    assert all(len(text) < WINDOW or len(text) % WINDOW == 0 for text in TEXTS)
    ours = bits_per_byte(stream_nats(model, stream, seq_len=WINDOW, overlap=0) for stream in streams())
    names = ["tiny_texts", "tiny_choices"]
    found = {}
    for kind, arguments in [
        ("hf", {"pretrained": str(exported), "backend": "causal"}),
        ("helmholtz", {"pretrained": str(run_folder)}),
    ]:
        result = evaluate(kind, arguments, tasks, names, monkeypatch)
        found[kind] = result["results"]
        assert result["results"]["tiny_texts"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-6)
    assert found["hf"]["tiny_choices"]["acc,none"] == found["helmholtz"]["tiny_choices"]["acc,none"]
    assert result["config"]["score"] == "log-likelihood"


def test_of_a_plan_the_scores_are_bounds_and_say_so(free_checkpoint, tasks, monkeypatch):
    model = load_checkpoint(free_checkpoint)
    ours = bits_per_byte(
        evaluate_bounds(model, stream, seq_len=WINDOW, n_samples=6).elbo * (len(stream) - 1)
        for stream in streams()
    )
    arguments = {"pretrained": str(free_checkpoint), "n_samples": 6, "bound": "elbo"}
    result = evaluate("helmholtz", arguments, tasks, ["tiny_texts", "tiny_choices"], monkeypatch)
    assert result["results"]["tiny_texts"]["bits_per_byte,none"] == pytest.approx(ours, rel=1e-6)
    assert "upper bounds" in result["config"]["score"] and "elbo" in result["config"]["score"]


class Request:
    def __init__(self, *args):
        self.args = args


def test_continuations_are_scored_exactly_and_text_is_generated(run_folder):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    lm, model = HelmholtzLM(str(run_folder), batch_size=3), load_checkpoint(run_folder / "best")
    pairs = [("the king", " shall"), ("", "love"), ("x" * 40, " and war"), ("the king", " of")]
    scores = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, text), (score, greedy) in zip(pairs, scores, strict=True):
        ids = [*(context.encode() or [256]), *text.encode()][-(WINDOW + 1) :]
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
        n = len(text.encode())
        assert score == pytest.approx(
            log_p[-n:].gather(1, torch.tensor(ids[-n:])[:, None]).sum().item(), rel=1e-5
        )
        assert greedy == (log_p[-n:].argmax(-1).tolist() == ids[-n:])
    short = {"max_gen_toks": 12}
    requests = [Request("the king", short | {"until": ["\n", "e"]}), Request("a", short | {"until": []})]
    texts = lm.generate_until(requests)
    assert len(texts) == 2 and "e" not in texts[0]
    assert lm.generate_until(requests) == texts
    with pytest.raises(ValueError, match="generation_kwargs: num_beams must be 1.*got 2"):
        lm.generate_until([Request("a", {"num_beams": 2})])


def test_a_continuation_without_text_is_certain(run_folder):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    lm = HelmholtzLM(str(run_folder))
    pairs = [("context", ""), ("the king", " of"), ("", ""), ("a ", "")]
    scores = lm.loglikelihood([Request(*pair) for pair in pairs], disable_tqdm=True)
    assert scores[1:2] == lm.loglikelihood([Request(*pairs[1])], disable_tqdm=True)
    assert [scores[i] for i in (0, 2, 3)] == [(0.0, True)] * 3


def test_a_continuation_that_melts_into_the_context_is_still_scored(run_folder):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM, TextIds

    lm = HelmholtzLM(str(run_folder))
    melted = {"th": [97], "e": [98], "the": [99]}
    (wanted,) = lm.loglikelihood([Request("a", "b")], disable_tqdm=True)
    lm.text = TextIds(melted.__getitem__, lm.text.decode, lm.text.end)
    assert lm.loglikelihood([Request("th", "e")], disable_tqdm=True) == [wanted]


LONG = "king of the night, " * 4


@pytest.mark.parametrize(
    ("context", "options", "kept", "n_new"),
    [
        ("the king", {}, 8, WINDOW - 9),  # 256 tokens are wanted by default, more than the window has
        ("the king", {"max_gen_toks": 12}, 8, 12),
        (LONG, {"max_gen_toks": 5}, WINDOW - 5, 5),
        (LONG, {"max_new_tokens": WINDOW // 4}, WINDOW - 8, 8),
        (LONG, {"max_tokens": 20}, WINDOW - 8, 8),
        (LONG[:20], {"max_completion_tokens": 20}, 20, WINDOW - 21),
        (LONG, {}, WINDOW - 8, 8),
    ],
)
def test_the_window_keeps_the_prompt_before_the_continuation(
    run_folder, monkeypatch, context, options, kept, n_new
):
    from helmholtz.interop.hf import lm_eval

    calls = []
    monkeypatch.setattr(lm_eval, "generate", lambda model, prompts, s: calls.append((prompts, s)) or [[]])
    lm = lm_eval.HelmholtzLM(str(run_folder))
    fits = len(context) + 1 + options.get("max_gen_toks", 256) <= WINDOW
    with contextlib.nullcontext() if fits else pytest.warns(UserWarning, match="of 1 prompts") as warned:
        lm.generate_until([Request(context, options)])
    assert fits or len(warned) == 1
    (((prompt,), settings),) = calls
    assert prompt == [256, *context.encode()][-kept - 1 if kept == len(context) else -kept :]
    assert settings.max_new_tokens == n_new


def read(options):
    from helmholtz.interop.hf.generation_kwargs import read_generation_kwargs

    return read_generation_kwargs(options, end=256, seed=0)


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 1}, 0.0),
        ({"do_sample": "false", "temperature": 0.7, "top_p": 0.9}, 0.0),
        ({"do_sample": "False"}, 0.0),
        ({"do_sample": 0}, 0.0),
        ({"do_sample": "true", "temperature": "0.7"}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
        ({"temperature": 0.8}, 0.8),
        ({"do_sample": None, "temperature": None}, 0.0),
    ],
)
def test_what_samples_and_what_takes_the_likeliest(options, temperature):
    assert read(options)[0].temperature == temperature


def test_the_other_generation_arguments():
    settings, until = read({"do_sample": True, "top_k": 0, "top_p": 0.95, "num_beams": 1, "until": "\n"})
    assert (settings.top_k, settings.top_p, settings.max_new_tokens, until) == (None, 0.95, 256, ["\n"])
    assert read({"max_gen_toks": "12", "max_tokens": 99})[0].max_new_tokens == 12
    for options, message in [
        ({"do_sample": "maybe"}, "do_sample must be true or false, got 'maybe'"),
        ({"num_beams": 10}, "num_beams must be 1: there is no beam search, got 10"),
        ({"max_gen_toks": "many"}, "generation_kwargs: .*'many'"),
        ({"max_gen_toks": 0}, "the most new tokens must be an integer of at least 1, got 0"),
        ({"max_length": 5}, "generation_kwargs has no key 'max_length'"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(options)


def task_kwargs():
    """Every ``generation_kwargs`` of the task files that come with lm_eval."""
    import lm_eval

    class Loader(yaml.CSafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda *_: None)  # functions
    for file in (Path(lm_eval.__file__).parent / "tasks").rglob("*"):
        if file.suffix in (".py", ".pyc", ".md") or not file.is_file():
            continue
        text = file.read_text(errors="ignore")
        if "\ngeneration_kwargs:" in text and (found := yaml.load(text, Loader)["generation_kwargs"]):
            yield found


def test_the_kwargs_of_every_task_file_are_honoured_and_a_beam_search_is_refused():
    refused, honoured = [], 0
    for options in task_kwargs():
        try:
            settings, until = read(options)
        except ValueError as error:
            refused.append(str(error))
            continue
        honoured += 1
        assert until == options.get("until", [])
        assert (settings.temperature > 0) == (options.get("do_sample") is True and options["temperature"] > 0)
        lengths = {options[name] for name in ("max_gen_toks", "max_new_tokens") if name in options}
        assert settings.max_new_tokens in (lengths or {256})
    assert refused == ["generation_kwargs: num_beams must be 1: there is no beam search, got 10"]
    assert honoured > 400


def test_continuations_under_plans_rank_as_the_bounds(free_checkpoint):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    lm, model = HelmholtzLM(str(free_checkpoint), n_samples=4, seed=2), load_checkpoint(free_checkpoint)

    def nats(text):
        stream = torch.tensor([256, *text.encode()])
        bound = evaluate_bounds(model, stream, seq_len=WINDOW, n_samples=4, seed=2)
        return bound.mixture_weighted * bound.n_tokens

    (score, _), (longer, _) = lm.loglikelihood([Request("", "ab"), Request("", "abc")], disable_tqdm=True)
    assert (score, longer) == (pytest.approx(-nats("ab")), pytest.approx(-nats("abc")))
    assert lm.loglikelihood_rolling([Request("ab"), Request("")]) == [pytest.approx(-nats("ab")), 0.0]


def test_options_that_a_model_does_not_have_are_refused(run_folder, free_checkpoint, tmp_path):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    cases = [
        (run_folder, {"bound": "elbo"}, "this model has no plan"),
        (run_folder, {"n_samples": 3}, "this model has no plan"),
        (run_folder, {"batch_size": "auto"}, "batch_size must be a number"),
        (run_folder, {"max_length": 99}, "seq_len must be at most the model's 32"),
        (free_checkpoint, {"bound": "kl"}, "bound must be one of"),
        (free_checkpoint, {"overlap": 4}, "overlap must be 0"),
        (tmp_path, {}, "neither a checkpoint"),
    ]
    for folder, options, message in cases:
        with pytest.raises(ValueError, match=message):
            HelmholtzLM(str(folder), **options)


def test_an_exported_plan_is_read_as_the_checkpoint(free_checkpoint, tmp_path):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    export(free_checkpoint, tmp_path / "out")
    lms = [HelmholtzLM(str(folder), n_samples=3) for folder in (free_checkpoint, tmp_path / "out")]
    (one,), (other,) = (lm.loglikelihood_rolling([Request(TEXTS[0])]) for lm in lms)
    assert one == other
