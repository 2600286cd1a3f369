"""score_at against the reference on the same sketches."""

from typing import Any

import pytest
import torch

from kvstore_kernels.backend import ReferenceBackend
from kvstore_kernels.cuda.score import score
from kvstore_kernels.cuda.score_at import score_at
from kvstore_kernels.types import Expansion
from tests.gpu import inputs
from tests.gpu.inputs import DEVICE, every_expansion, on_pages, queries, worst
from tests.kernels.inputs import sign_rows

inputs.require_device()
pytestmark = pytest.mark.gpu


@every_expansion
@pytest.mark.parametrize(("first", "cap"), [(0, 0.0), (5, 20.0)])
def test_chosen_tokens_score_as_when_all_are(by: Expansion, first: int, cap: float) -> None:
    rows, q = sign_rows(700, by), queries(by)
    pages = on_pages(rows, values=False, first=first)
    how: dict[str, Any] = {"sm_scale": 0.125, "logit_soft_cap": cap}
    for count in (1, 64, 65, 200):
        positions = torch.randint(700, (*q.shape[:2], count), generator=torch.Generator().manual_seed(count))
        found = score_at(q, pages, positions.to(DEVICE), **how)
        expected = ReferenceBackend().score_at(q.cpu(), rows, positions, **how)
        assert worst(found, expected) <= 2e-6 * (1 + float(expected.abs().max()))
        all_of_them = score(q, pages, **how).gather(2, positions.to(DEVICE))
        assert worst(found, all_of_them) <= 4e-6 * (1 + float(expected.abs().max()))
