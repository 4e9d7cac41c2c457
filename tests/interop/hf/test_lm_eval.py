"""The numbers of lm-evaluation-harness are ours: both model types, on a task in a file, without a network."""

import json
import math
from importlib.util import find_spec

import pytest
import torch

from decoder_cases import SIZES, liven
from helmholtz.data.tokenizer import ByteTokenizer
from helmholtz.evals.language import stream_nats
from helmholtz.evals.latent import stream_bounds
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
        stream_bounds(model, stream, seq_len=WINDOW, n_samples=6).elbo * (len(stream) - 1)
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
    requests = [Request("the king", {"until": ["\n", "e"], "max_gen_toks": 12}), Request("a", {"until": []})]
    texts = lm.generate_until(requests)
    assert len(texts) == 2 and "e" not in texts[0]
    assert lm.generate_until(requests) == texts
    with pytest.raises(ValueError, match="generation_kwargs has no key 'num_beams'"):
        lm.generate_until([Request("a", {"num_beams": 2})])


def test_continuations_under_plans_rank_as_the_bounds(free_checkpoint):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    lm, model = HelmholtzLM(str(free_checkpoint), n_samples=4, seed=2), load_checkpoint(free_checkpoint)

    def nats(text):
        stream = torch.tensor([256, *text.encode()])
        bound = stream_bounds(model, stream, seq_len=WINDOW, n_samples=4, seed=2)
        return bound.mixture_weighted * bound.n_tokens

    (score, _), (longer, _) = lm.loglikelihood([Request("", "ab"), Request("", "abc")], disable_tqdm=True)
    assert (score, longer) == (pytest.approx(-nats("ab")), pytest.approx(-nats("abc")))
    assert lm.loglikelihood_rolling([Request("ab"), Request("")]) == [pytest.approx(-nats("ab")), 0.0]


def test_options_that_a_model_does_not_have_are_refused(run_folder, free_checkpoint, tmp_path):
    from helmholtz.interop.hf.lm_eval import HelmholtzLM

    cases = [
        (run_folder, {"bound": "elbo"}, "only a free_transformer has bounds"),
        (run_folder, {"n_samples": 3}, "only a free_transformer has bounds"),
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
