"""The decoders of ``every_decoder``, livened."""

import pytest
import torch

from decoder_cases import liven, plan_by_tokens
from every_decoder import DECODERS
from helmholtz.models.decoder import Decoder


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    plan_by_tokens(monkeypatch)
    torch.manual_seed(1)
    return liven(DECODERS[request.param]())


@pytest.fixture
def transformer() -> Decoder:
    torch.manual_seed(1)
    return liven(DECODERS["transformer"]())
