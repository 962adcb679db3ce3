"""Attention padded to a kernel's widths computes the same, and a fused kernel takes it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import attention
from models.attention import attend, fused_widths, padded_attention

# Of numbers around 1: what another order of summation may change.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}


def heads(batch, queries, keys, width, value_width, dtype=torch.float32, seed=0):
    """Queries, keys and values of two heads."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, width), (keys, width), (keys, value_width))
    return [torch.randn(batch, 2, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 33), st.integers(1, 33), st.integers(0, 9), st.integers(0, 9), st.sampled_from(list(TOLERANCE)),
    st.sampled_from(["none", "keys", "queries"]), st.integers(0, 2**31),
)  # fmt: skip
def test_padded_and_unpadded_agree_with_their_gradients(width, value_width, more, more_value, dtype, mask_of, seed):
    given_heads = heads(2, 3, 5, width, value_width, dtype, seed)
    mask = torch.rand({"none": (1, 1, 1, 1), "keys": (2, 1, 1, 5), "queries": (3, 5)}[mask_of]) < 0.6
    mask[..., 0] = True  # no query without a key
    found, gradients = [], []
    for widths in ((width, value_width), (width + more, value_width + more_value)):
        tensors = [t.clone().requires_grad_() for t in given_heads]
        with sdpa_kernel(SDPBackend.MATH):
            out = padded_attention(*tensors, None if mask_of == "none" else mask, 0.0, widths)
        found.append(out.detach())
        gradients.append(torch.autograd.grad(out, tensors, torch.ones_like(out)))
    assert found[1].shape == (2, 2, 3, value_width)
    for plain, padded in zip((found[0], *gradients[0]), (found[1], *gradients[1]), strict=True):
        torch.testing.assert_close(padded, plain, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.integers(0, 2**31))
def test_attention_without_gradients_is_the_equation(width, value_width, masked, seed):
    query, key, value = heads(2, 3, 5, width, value_width, seed=seed)
    mask = torch.tensor([True, False, True, True, False])[None, None, None] if masked else None
    with torch.no_grad():
        found = attend(query, key, value, mask, 0.0)
    logits = query.double() @ key.double().mT / width**0.5
    if masked:
        logits = logits.masked_fill(~mask, -torch.inf)
    expected = (logits.softmax(-1) @ value.double()).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("widths", "device_type", "dtype", "expected"),
    [
        ((38, 19), "cuda", torch.bfloat16, (40, 24)),
        ((38, 19), "cuda", torch.float16, (40, 24)),
        ((38, 19), "cuda", torch.float32, (40, 20)),
        ((64, 32), "cuda", torch.bfloat16, (64, 32)),
        ((23, 23), "cuda", torch.bfloat16, (24, 24)),
        ((38, 19), "cuda", torch.float64, (38, 19)),  # no fused kernel takes it
        ((38, 19), "cpu", torch.float32, (38, 38)),
        ((38, 19), "cpu", torch.bfloat16, (40, 40)),
        ((2, 20), "cpu", torch.float32, (20, 20)),
        ((23, 23), "cpu", torch.bfloat16, (23, 23)),
        ((38, 19), "mps", torch.float16, (38, 19)),
    ],
)
def test_widths_are_those_of_the_kernels(widths, device_type, dtype, expected):
    assert fused_widths(*widths, device_type, dtype) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_kernel_takes_queries_wider_than_values(dtype):
    """As a cross-attention has them; without padding there is no such kernel, or there is no need for it."""
    tensors = heads(1, 3, 5, 38, 19, dtype)
    with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attend(*tensors, torch.tensor([[[[True, True, False, True, True]]]]), 0.0)
        with pytest.raises(RuntimeError, match=r"[Nn]o available kernel|[Nn]o viable backend"):
            padded_attention(*tensors, None, 0.0, (38, 19))


@pytest.fixture
def kernel_widths(monkeypatch):
    """The head widths that the kernel is given, in order."""
    seen, kernel = [], F.scaled_dot_product_attention

    def note(query, key, value, **options):
        seen.append((query.shape[-1], value.shape[-1]))
        return kernel(query, key, value, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", note)
    return seen


def test_the_precision_is_that_of_autocast(kernel_widths):
    with torch.no_grad():
        attend(*heads(1, 3, 5, 38, 19), None, 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            attend(*heads(1, 3, 5, 38, 19), None, 0.0)
    assert kernel_widths == [(38, 38), (40, 40)]


def test_nothing_is_padded_where_a_gradient_is_wanted_on_the_cpu(kernel_widths):
    attend(*heads(1, 3, 5, 38, 19), None, 0.0)
    assert kernel_widths == [(38, 19)]


def test_nothing_is_padded_in_what_is_exported():
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return attend(query, key, value, None, 0.0)

    with torch.no_grad():
        program = torch.export.export(Attention(), tuple(heads(1, 3, 5, 38, 19)))
    assert not [node for node in program.graph.nodes if "pad" in str(node.target)]


def test_padding_is_compiled_without_a_break():
    """Traced alone: a compiler is not asked for."""
    tensors = heads(1, 3, 5, 38, 19)
    with torch.no_grad():
        compiled = torch.compile(attend, backend="eager", fullgraph=True)(*tensors, None, 0.0)
        torch.testing.assert_close(compiled, attend(*tensors, None, 0.0))
