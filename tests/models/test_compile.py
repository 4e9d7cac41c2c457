"""Compiled and exported decoders: one graph from ids to logits, forward and backward, and its plain forms in a file."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.export import Dim, export

from decoder_cases import codes_of, tokens_of
from every_decoder import DECODERS
from helmholtz import kernels
from helmholtz.layers.fem_config import PRIORS
from helmholtz.layers.latent import Plan
from helmholtz.models import Decoder
from helmholtz.solvers import Implicit, SolverConfig

# the compiler itself warns about what it does
pytestmark = [pytest.mark.compile, pytest.mark.filterwarnings("ignore")]
ADJOINT = Implicit(max_steps=2, on_nonconvergence="ignore")
COMPILED = ["transformer", "free", "mamba", "mamba-hopfield", "hybrid", *(f"fem-{prior}" for prior in PRIORS)]
"""What joins attention, FEM, Mamba, a plan and an equilibrium is the hybrid. Mixers have tests of their own."""
IN_PLAIN_FORMS = ["free", "mamba-hopfield", "fem-linear", "fem-mamba"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def decoder(name: str) -> Decoder:
    """With few steps of the solver, that it may be traced in a second."""
    model = DECODERS[name]().eval()
    if model.equilibrium is not None:
        model.solver = SolverConfig(max_steps=2, on_nonconvergence="ignore")
        model.equilibrium.adjoint = ADJOINT
    return model


def logits_and_gradients(model: Decoder, run: nn.Module, tokens: Tensor, mask: Tensor) -> list[Tensor]:
    """A plan that is given has a gradient for its bit logits; what has none in eager mode has zeros in a graph."""
    plan, leaves = None, [x for x in model.parameters() if x.requires_grad]
    if model.plan is not None:
        torch.manual_seed(0)
        plan = Plan(codes_of(*tokens.shape), torch.randn(*tokens.shape, 5, requires_grad=True))
        leaves.append(plan.logits)
    logits = run(tokens, attention_mask=mask, z=plan).logits
    gradients = torch.autograd.grad(logits.square().mean(), leaves, allow_unused=True)
    assert plan is None or gradients[-1].any()
    return [
        logits,
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
    ]


@pytest.mark.parametrize("name", COMPILED)
def test_a_decoder_is_one_graph(name):
    model, tokens = decoder(name), tokens_of(2, 9)
    mask = torch.arange(9) >= torch.tensor([[0], [4]])
    with kernels.plain_forms() if name in IN_PLAIN_FORMS else nullcontext():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        both = [logits_and_gradients(model, run, tokens, mask) for run in (compiled, model)]
    for actual, expected in zip(*both, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


class Logits(nn.Module):
    """What is exported: an output of tensors alone."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, code: Tensor | None = None) -> Tensor:
        return self.model(tokens, z=None if code is None else Plan(code)).logits


ATTENTION_ALONE = ["transformer", "free"]
"""Others are cut into chunks: a graph of theirs is for one length."""


@pytest.mark.parametrize("name", ["transformer", "fem-hybrid", "free", "mamba", "mamba-hopfield"])
def test_a_decoder_is_exported_in_plain_forms(name):
    model = Logits(decoder(name))
    tokens, more = ((tokens_of(n, 9), *([codes_of(n, 9)] if model.model.plan else [])) for n in (2, 3))
    shapes = {0: Dim("batch", min=2, max=64)}
    if name in ATTENTION_ALONE:
        shapes[1] = Dim("time", min=2, max=64)
        more = [x.repeat(1, 3) for x in more]
    program = export(model, tokens, dynamic_shapes=(shapes,) * len(tokens))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names and not [name for name in names if "helmholtz" in name]
    for given in (tokens, more):
        torch.testing.assert_close(program.module()(*given), model(*given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["transformer", "mamba", "fem-softmax", "fem-gla"])
def test_all_blocks_of_a_kind_share_a_graph(name):
    """The compiler makes eight of one function at most, and refuses to go on."""
    model = DECODERS[name]()
    model = type(model)(replace(model.config, n_layers=10))
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    counters.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens_of(2, 9)).logits.sum().backward()
    assert counters["stats"]["unique_graphs"] <= 2  # the first block's input has no gradient
