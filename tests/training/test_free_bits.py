"""The Free Transformer's objective: its formula, its schedules, its report, and a run through the loop."""

import io
import json
import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helmholtz import ops, reference
from helmholtz.cli.arguments import parse
from helmholtz.cli.main import main
from helmholtz.cli.runs import run_parser
from helmholtz.data.tokens import TokenDataset
from helmholtz.layers.latent import Plan
from helmholtz.models import MODELS
from helmholtz.models.checkpoint import load_checkpoint
from helmholtz.models.free_transformer import FreeTransformer, FreeTransformerConfig, control
from helmholtz.models.transformer import Transformer
from helmholtz.training.callbacks import Callback, EvalRecord, ProgressBar
from helmholtz.training.config import RunConfig
from helmholtz.training.free_bits import FreeBitsConfig, FreeBitsObjective
from helmholtz.training.loop import Trainer
from helmholtz.training.run import train
from tiny_runs import prepare_text, tiny_run

CONFIGS = Path(__file__).parents[2] / "configs" / "demo"
MODEL = FreeTransformerConfig(
    vocab_size=257, d_model=16, n_layers=2, n_heads=2, max_seq_len=32, n_latent_bits=3, dropout=0.1,
    initializer_range=0.02,  # an encoder so unsure that some tokens' bits are free
)  # fmt: skip
BIT = math.log(2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def model():
    """In evaluation mode, with bit logits of every size."""
    model = FreeTransformer(MODEL).eval()
    with torch.no_grad():
        model.encoder.readout.weight *= 100
        model.post_sampler.weight *= 20
    return model


@pytest.fixture
def tokens():
    return torch.randint(257, (3, 13))


def free_run(data, output, objective=None, **changes):
    run = tiny_run(data, output, **changes)
    return replace(run, architecture="free_transformer", model=MODEL, objective=objective or FreeBitsConfig())


def free_trainer(data, output, objective=None, **changes):
    objective = objective or FreeBitsConfig()
    run = free_run(data, output, **changes)
    torch.manual_seed(0)
    splits = TokenDataset(data.folder, "train"), TokenDataset(data.folder, "validation")
    bits = FreeBitsObjective(objective)
    factors = {"encoder.": objective.encoder_lr_factor}
    return Trainer(
        FreeTransformer(MODEL), *splits, run.train, objective=bits, report=bits.report, lr_factors=factors
    )


def metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


# --- the loss


def expected_terms(model, tokens, kappa):
    """From the three stages, with torch's global generator where it is."""
    half = model.lower(tokens[:, :-1])
    z = model.sample_posterior(half)
    log_p = model.upper(half, z).logits.double().log_softmax(-1)
    reconstruction = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    kl = reference.kl_per_token(z.logits)
    return reconstruction, reference.free_bits(kl, kappa), kl


def test_the_loss_is_cross_entropy_and_the_hinge_of_each_token(model, tokens):
    model.train()
    kappa = expected_terms(model, tokens, 0.0)[2].mean().item()
    torch.manual_seed(3)
    objective = FreeBitsObjective(FreeBitsConfig(kappa_bits=kappa / BIT))(model, tokens, 0)
    torch.manual_seed(3)
    reconstruction, charge, kl = expected_terms(model, tokens, kappa)
    assert charge > 0.01, "the hinge of the mean would be 0"
    for value, wanted in [
        (objective.loss, reconstruction + charge),
        (objective.terms["reconstruction"], reconstruction),
        (objective.terms["free_bits"], charge),
        (objective.terms["kl"], kl.mean()),
        (objective.bound, reconstruction + kl.mean()),
    ]:
        assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert not objective.bound.requires_grad
    assert not any(term.requires_grad for term in objective.terms.values())


def test_the_lower_half_and_the_encoder_run_once(model, tokens):
    model.train()
    calls = []
    for part in (model.embed, *model.blocks, model.encoder):
        part.register_forward_hook(lambda module, args, out: calls.append(module))
    FreeBitsObjective(FreeBitsConfig())(model, tokens, 0)
    assert calls == [model.embed, model.blocks[0], model.encoder, model.blocks[1]]


def test_every_parameter_gets_a_gradient(model, tokens):
    FreeBitsObjective(FreeBitsConfig(kappa_bits=0.0))(model, tokens, 0).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name


def test_another_model_is_refused(tokens):
    plain = Transformer(control(replace(MODEL, d_ff=48)))
    for call in (FreeBitsObjective(FreeBitsConfig()), FreeBitsObjective(FreeBitsConfig()).report):
        with pytest.raises(ValueError, match="plan: wanted .*, got a Transformer without one"):
            call(plain, tokens if call.__class__ is FreeBitsObjective else [tokens], 0)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"kappa_bits": -0.5}, "objective.kappa_bits must be a finite number of at least 0, got -0.5"),
        ({"kappa_bits": math.nan}, "objective.kappa_bits must be a finite number of at least 0, got nan"),
        ({"kappa_bits": math.inf}, "objective.kappa_bits must be a finite number of at least 0, got inf"),
        ({"kappa_start_bits": -1.0, "kappa_steps": 3}, "objective.kappa_start_bits must be a finite number"),
        ({"kappa_start_bits": 2.0}, "objective.kappa_steps must be above 0 with objective.kappa_start_bits, got 0"),
        ({"kappa_steps": 3}, "objective.kappa_steps must be 0 without objective.kappa_start_bits, got 3"),
        ({"kappa_steps": -1}, "objective.kappa_steps must be an integer of at least 0, got -1"),
        ({"kl_warmup_steps": -1}, "objective.kl_warmup_steps must be an integer of at least 0, got -1"),
        ({"encoder_lr_factor": 0.0}, "objective.encoder_lr_factor must be a finite number above 0, got 0.0"),
        ({"encoder_lr_factor": math.nan}, "objective.encoder_lr_factor must be a finite number above 0, got nan"),
    ],
)  # fmt: skip
def test_a_bad_setting_is_named_with_its_value(setting, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        FreeBitsConfig(**setting)


# --- what keeps a plan from collapsing


@pytest.mark.parametrize("start", [4.0, 0.0])
def test_kappa_goes_from_its_start_to_its_end_and_stays(model, tokens, start):
    config = FreeBitsConfig(kappa_bits=1.0, kappa_start_bits=start, kappa_steps=10)
    wanted = {0: start, 5: (start + 1) / 2, 10: 1.0, 99: 1.0}
    for step, bits in wanted.items():
        assert config.kappa(step) == pytest.approx(bits * BIT)
        torch.manual_seed(3)
        terms = FreeBitsObjective(config)(model, tokens, step).terms
        torch.manual_seed(3)
        assert terms["free_bits"].item() == pytest.approx(
            expected_terms(model, tokens, bits * BIT)[1].item(), rel=1e-5, abs=1e-7
        )
    assert FreeBitsConfig(kappa_bits=1.0).kappa(0) == pytest.approx(BIT)


def test_the_weight_of_the_charge_rises_from_0_to_1(model, tokens):
    config = FreeBitsConfig(kappa_bits=0.25, kl_warmup_steps=4)
    model.train()
    for step, weight in {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 50: 1.0}.items():
        objective = FreeBitsObjective(config)(model, tokens, step)
        terms = {name: term.item() for name, term in objective.terms.items()}
        assert terms["free_bits"] > 0.1
        assert objective.loss.item() == pytest.approx(
            terms["reconstruction"] + weight * terms["free_bits"], rel=1e-6
        )
        assert objective.bound.item() == pytest.approx(terms["reconstruction"] + terms["kl"], rel=1e-6)
    assert FreeBitsConfig().weight(0) == 1.0


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_the_encoder_learns_at_its_own_rate(data, tmp_path, factor):
    """One step of AdamW is proportional to the learning rate, decay included."""
    moved = []
    for config in (FreeBitsConfig(), FreeBitsConfig(encoder_lr_factor=factor)):
        loop = free_trainer(data, tmp_path, config, warmup_steps=0)
        before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
        assert loop.step().lr == loop.config.lr
        moved.append({name: p.detach() - before[name] for name, p in loop.model.named_parameters()})
    for name, change in moved[0].items():
        assert change.any(), name
        wanted = change * factor if name.startswith("encoder.") else change
        torch.testing.assert_close(moved[1][name], wanted, rtol=1e-3, atol=1e-7, msg=name)


# --- evaluation


def test_the_validation_loss_is_the_bound_and_the_report_says_what_it_is_made_of(data, tmp_path):
    config = FreeBitsConfig(kappa_bits=0.05)
    loop = free_trainer(data, tmp_path, config)
    with torch.no_grad():
        loop.model.encoder.readout.weight *= 30
    record = loop.evaluate()
    s = record.statistics
    elbo = s["posterior_cross_entropy_leaking"] + s["kl"]
    assert record.validation_loss <= (min(elbo, s["prior_cross_entropy"]) + math.log(2) / 16) * (1 + 1e-6)
    assert s["kl"] == pytest.approx(sum(s[f"kl_bit_{bit}"] for bit in range(3)), rel=1e-6)
    assert 0 < s["free_bits"] < s["kl"] < s["free_bits"] + s["kappa"]
    assert s["kappa"] == pytest.approx(0.05 * BIT)
    assert 0 < s["mutual_information"] < s["kl"]
    assert s["active_bits"] == sum(s[f"kl_bit_{bit}"] > 0.01 for bit in range(3)) > 0
    assert 1 <= s["code_perplexity"] <= s["codes_used"] <= 8
    assert record.warnings == {}


def test_a_kl_that_says_nothing_does_not_loosen_the_bound(data, tmp_path):
    """With a table of zeros every plan gives the model's own probability; the ELBO charges the KL all the same."""
    loop = free_trainer(data, tmp_path)
    with torch.no_grad():
        loop.model.encoder.readout.weight *= 30
        loop.model.post_sampler.weight.zero_()
    record, exact = loop.evaluate(), loop.evaluate().statistics["prior_cross_entropy"]
    assert record.statistics["kl"] > 0.2
    assert abs(record.validation_loss - exact) < 0.1 * record.statistics["kl"]


def test_the_evaluation_s_bound_is_one(model, tokens):
    """The mean of exp(-T bound) over draws of plans is the probability of the text, by enumeration of all plans."""
    rows, n_bits = tokens[:1, :4], model.config.n_latent_bits
    codes = torch.cartesian_prod(*[torch.arange(2**n_bits)] * 3)
    with torch.no_grad():
        model.eval().post_sampler.weight.mul_(20)
        logits = model(rows[:, :-1].expand(len(codes), -1), z=Plan(codes)).logits.double().log_softmax(-1)
        given = logits.gather(-1, rows[:, 1:, None].expand(len(codes), -1, -1)).sum((1, 2))
        exact = given.exp().mean()
        objective = FreeBitsObjective(FreeBitsConfig())
        draws = torch.stack([(-3 * objective(model, rows, 0).bound.double()).exp() for _ in range(600)])
    assert (draws.mean() - exact).abs() < 4 * draws.std() / len(draws) ** 0.5
    assert -draws.log().mean() / 3 > -exact.log() / 3 - 1e-3


def test_the_prior_s_cross_entropy_is_of_plans_that_are_the_same_at_every_evaluation(data, tmp_path):
    loop = free_trainer(data, tmp_path)
    with torch.no_grad():
        loop.model.post_sampler.weight *= 50
    first = loop.evaluate().statistics["prior_cross_entropy"]
    torch.manual_seed(123)
    loop.progress.step = 7
    assert loop.evaluate().statistics["prior_cross_entropy"] == first
    total, generator = 0.0, torch.Generator().manual_seed(0)
    for tokens, _ in loop.batches.of_validation():
        z = loop.model.sample_prior(len(tokens), 16, generator=generator)
        with torch.no_grad():
            logits = loop.model.eval()(tokens[:, :-1], z=z).logits
        total += len(tokens) * ops.cross_entropy(logits, tokens[:, 1:]).item()
    assert first == pytest.approx(total / 10)
    loop.loss_module._objective.seed = 1
    assert loop.evaluate().statistics["prior_cross_entropy"] != first


def warnings_of(model, config, step, logits):
    batches = [torch.randint(257, (4, 17)) for _ in range(3)]
    model.posterior = lambda half: logits.expand(4, 16, 3)
    return FreeBitsObjective(config).report(model, batches, step).warnings


def test_a_plan_that_says_nothing_is_called_collapsed(model):
    config = FreeBitsConfig(kappa_bits=0.5)
    nothing = warnings_of(model, config, 1, torch.zeros(()))
    assert "the plan says 0 bits about its token (KL 0, free 0.5)" in nothing["collapsed"]
    constant = warnings_of(model, config, 1, torch.tensor(1.0))  # within kappa, for nothing
    assert "KL 0.48, free 0.5" in constant["collapsed"]
    signs = torch.tensor([1.0, -1.0]).repeat(8).view(1, 16, 1)
    assert warnings_of(model, config, 1, signs) == {}


def test_a_collapse_is_called_only_after_the_schedules(model):
    for config in (FreeBitsConfig(kl_warmup_steps=5), FreeBitsConfig(kappa_start_bits=2.0, kappa_steps=5)):
        found = [warnings_of(model, config, step, torch.zeros(())) for step in (4, 5)]
        assert [list(warnings) for warnings in found] == [[], ["collapsed"]]


def test_a_warning_is_shown_once():
    out = io.StringIO()
    bar = ProgressBar(Console(file=out, width=200), start=0, total=3)
    for step in (1, 2, 3):
        warnings = {"collapsed": "the plan [x] is not used"} if step > 1 else {}
        bar.on_eval(EvalRecord(step, 10, 1.0, 1.4, best=False, warnings=warnings))
    lines = out.getvalue().splitlines()
    assert lines[2] == "warning: collapsed at step 2: the plan [x] is not used"
    assert len(lines) == 4


# --- runs


class Crash(Callback):
    def on_step(self, record):
        if record.step == 11:
            raise ConnectionError("the machine is gone")


REMEDIES = FreeBitsConfig(
    kappa_bits=0.2, kappa_start_bits=1.0, kappa_steps=12, kl_warmup_steps=14, encoder_lr_factor=2.0
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(data, tmp_path, precision):
    whole, broken, settings = tmp_path / "whole", tmp_path / "broken", {"steps": 15, "precision": precision}
    train(free_run(data, whole, REMEDIES, **settings))
    with pytest.raises(ConnectionError):
        train(free_run(data, broken, REMEDIES, **settings), callbacks=[Crash()])
    torch.manual_seed(99)
    train(free_run(data, broken, REMEDIES, **settings, resume="auto"))
    assert metrics(broken) == metrics(whole)
    one, two = (load_checkpoint(folder / "last").state_dict() for folder in (whole, broken))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_objective_is_part_of_the_run(data, tmp_path):
    run = free_run(data, tmp_path, steps=4)
    train(run)
    identity = json.loads((tmp_path / "run.json").read_text())["identity"]
    assert identity["objective"] == asdict(FreeBitsConfig())
    other = replace(run, objective=FreeBitsConfig(kappa_bits=1.0), train=replace(run.train, resume="auto"))
    with pytest.raises(ValueError, match="holds a different run: objective.kappa_bits was 0.5, now 1.0"):
        train(other)


def test_training_uses_what_the_run_says(data, tmp_path):
    objective = FreeBitsConfig(kappa_bits=0.0, kl_warmup_steps=2)
    train(free_run(data, tmp_path, objective, steps=4, lr=1e-5, warmup_steps=1))
    first, *_, last, evaluation = metrics(tmp_path)
    assert first["loss"] == pytest.approx(first["terms"]["reconstruction"], rel=1e-6)
    assert last["terms"]["free_bits"] == last["terms"]["kl"]
    for record in (first, last):  # bits per byte of the bound, though the loss leaves the charge out at first
        assert record["bits_per_byte"] * BIT > record["terms"]["reconstruction"] + 0.9 * record["terms"]["kl"]
    assert evaluation["warnings"] == {}, "kappa is 0: there is nothing to be used"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["parameters"] == sum(p.numel() for p in FreeTransformer(MODEL).parameters())


def test_a_collapsed_run_says_so_in_the_console_and_in_its_metrics(data, tmp_path):
    out = io.StringIO()
    run = free_run(data, tmp_path, FreeBitsConfig(kappa_bits=3.0), lr=1e-6)
    train(run, console=Console(file=out, width=300))
    marked = [r["step"] for r in metrics(tmp_path) if r["kind"] == "eval" and "collapsed" in r["warnings"]]
    assert marked == [5, 10, 15, 20]
    assert out.getvalue().count("warning: collapsed at step 5") == out.getvalue().count("warning:") == 1


def test_only_a_free_transformer_has_an_objective(data, tmp_path):
    plain = tiny_run(data, tmp_path)
    assert plain.objective is None
    with pytest.raises(ValueError, match="objective must be absent for transformer: .* neither a plan nor"):
        replace(plain, objective=FreeBitsConfig())
    filled = RunConfig(architecture="free_transformer", model=MODEL, data=data, train=plain.train)
    assert filled.objective == FreeBitsConfig()
    for settings in ({"kl_warmup_steps": 21}, {"kappa_start_bits": 1.0, "kappa_steps": 21}):
        name = "kappa_steps" if "kappa_steps" in settings else "kl_warmup_steps"
        with pytest.raises(ValueError, match=f"objective.{name} must be at most train.steps = 20, got 21"):
            replace(filled, objective=FreeBitsConfig(**settings))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_narrow_precision_learns_with_its_kl_in_float32(data, tmp_path, precision):
    loop = free_trainer(data, tmp_path, FreeBitsConfig(kappa_bits=0.01), precision=precision, lr=1e-2)
    dtypes = set()
    loop.model.encoder.readout.register_forward_hook(lambda module, args, out: dtypes.add(out.dtype))
    start = loop.evaluate().validation_loss
    records = [loop.step() for _ in range(20)]
    assert dtypes == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert not any(record.skipped for record in records[5:])
    assert loop.evaluate().validation_loss < start - 0.5
    with loop._autocast():
        objective = loop.loss_module._objective(loop.model, loop.batches.micro_batch(0, 0)[0], 0)
    assert {x.dtype for x in (objective.loss, objective.bound, *objective.terms.values())} == {torch.float32}


# --- the command line and the committed configs


def values(file):
    arguments = [f"--config={CONFIGS}.yaml", f"--config={CONFIGS / file}"]
    return parse(run_parser("train", "", arguments), arguments)


def test_the_control_of_the_demo_has_its_parameters():
    free, plain, baseline = (
        values(name) for name in ("free_transformer.yaml", "control.yaml", "baseline.yaml")
    )
    configs = {}
    for run in (free, plain):
        architecture = run["model"].pop("architecture")
        configs[architecture] = MODELS[architecture].config_class.from_dict(
            run["model"] | {"vocab_size": 2048}
        )
    assert configs["transformer"] == control(configs["free_transformer"])
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in MODELS[name](c).parameters()) for name, c in configs.items()]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.001)
    with torch.device("meta"):
        plain_config = MODELS["transformer"].config_class.from_dict(
            {k: v for k, v in baseline["model"].items() if k != "architecture"} | {"vocab_size": 2048}
        )
        wanted = sum(p.numel() for p in MODELS["transformer"](plain_config).parameters())
    assert sizes[0] == pytest.approx(wanted, rel=0.005)  # all five models of the demo are of one size
    for run in (free, plain):
        assert run["data"] == baseline["data"]
        changed = {"output_dir": baseline["train"]["output_dir"]}
        assert run["train"] | changed == baseline["train"]


def test_the_demo_s_config_trains_from_the_shell(data, tmp_path, capsys):
    common = [
        f"--config={CONFIGS}.yaml", f"--config={CONFIGS / 'free_transformer.yaml'}", f"--data.folder={data.folder}",
        f"--data.sources={list(data.sources)}", "--data.tokenizer=bytes", "--data.vocab_size=257",
        "--data.validation_fraction=0.1",
        f"--train.output_dir={tmp_path / 'run'}", "--train.steps=2", "--train.batch_size=2", "--train.seq_len=16",
        "--train.warmup_steps=1", "--train.eval_tokens=64", "--model.d_model=16", "--model.n_heads=2",
    ]  # fmt: skip
    assert main(["train", *common, "--objective.kl_warmup_steps=1"]) == 0
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["objective"] == asdict(FreeBitsConfig(kl_warmup_steps=1))
    assert metrics(tmp_path / "run")[-1]["statistics"]["prior_cross_entropy"] > 0
    capsys.readouterr()
    for arguments, message in [
        (["--objective.kappa_bits=-1"], "objective.kappa_bits must be a finite number of at least 0, got -1.0"),
        (["--objective.kapa_bits=1"], "unknown option --objective.kapa_bits; did you mean 'objective.kappa_bits'?"),
        (["--model.architecture=transformer"], "unknown key 'model.n_latent_bits'"),
    ]:  # fmt: skip
        assert main(["train", *common, *arguments]) == 2
        assert re.search(re.escape(message), capsys.readouterr().err)
    assert main(["train", f"--config={CONFIGS / 'control.yaml'}", "--objective.kappa_bits=1"]) == 2
    assert "unknown option --objective.kappa_bits" in capsys.readouterr().err
