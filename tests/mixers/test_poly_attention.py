"""Poly-attention against its definition, a sum over all tuples of tokens."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from attnzoo import create_attention
from attnzoo.errors import OptionError
from tests.mixers.test_relatives import DIM, HEADS, assert_same, build, x_of

WIDTH = DIM // HEADS
TUPLED = 5  # tokens of which all tuples are written out


def definition(m, x):
    """Head by head, over every tuple of tokens."""
    queries = (x @ m.queries.weight.T + m.queries.bias).unflatten(-1, (m.order, HEADS, WIDTH))
    values = (x @ m.values.weight.T + m.values.bias).unflatten(-1, (m.order - 1, HEADS, WIDTH))
    rows = []
    for first in range(x.shape[1]):
        above, below = 0, 0
        for others in itertools.product(range(x.shape[1]), repeat=m.order - 1):
            tokens = (first, *others)
            pairs = enumerate(itertools.pairwise(tokens))
            h = sum((queries[:, a, i] * queries[:, b, i + 1]).sum(-1) for i, (a, b) in pairs)  # (B, H)
            weight = torch.exp(h / WIDTH**0.5)
            product = 1
            for place, token in enumerate(others):
                product = product * values[:, token, place]
            above, below = above + weight[..., None] * product, below + weight
        rows.append((above / below[..., None]).flatten(1))
    return torch.stack(rows, 1) @ m.proj.weight.T + m.proj.bias


@pytest.mark.parametrize("order", [2, 3, 4])
def test_it_is_its_definition(order):
    m = build("poly_attention", order=order)
    assert_same(m, lambda x: definition(m, x), x_of()[:, :TUPLED].clone())


def test_of_order_2_it_is_softmax_attention():
    m = build("poly_attention", order=2)

    def oracle(x):
        q, k = m.queries(x).unflatten(-1, (2, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
        v = m.values(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return m.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    assert_same(m, oracle)


def test_it_begins_as_attention_over_the_values_that_it_inherits():
    m = build("poly_attention", order=4)
    weight, bias = torch.randn(DIM, DIM).double(), torch.randn(DIM).double()
    m.inherit(weight, bias)
    x = x_of()
    with torch.no_grad():
        m.queries.weight.zero_(), m.queries.bias.zero_()  # all weights are alike
        mean = (x @ weight.T + bias).mean(1, keepdim=True).expand_as(x)
        torch.testing.assert_close(m(x), mean)


def test_large_scores_stay_finite_in_half_precision():
    m = create_attention("poly_attention", DIM, HEADS, order=4).to(torch.bfloat16)
    x = (100 * x_of()).to(torch.bfloat16).requires_grad_()
    out = m(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()


def test_an_order_without_a_second_token_is_refused():
    with pytest.raises(OptionError, match="order"):
        create_attention("poly_attention", DIM, HEADS, order=1)
