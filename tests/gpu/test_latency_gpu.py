"""On CUDA a fused kernel accepts attentions of every published width, and the latency benchmark runs."""

import json
import warnings

import pytest
import torch
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import latency
from bench.published import GP_WIDTHS, MGP_WIDTHS
from models.attention import attend, fused_widths, padded_attention

pytestmark = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = torch.device("cuda")
NHEADS, PIXELS, QUERIES = 8, 850, 300
# Of numbers around 1, beside the unfused products in float64.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def published():
    """(queries, keys, query width, value width) of one head for every attention of the paper's slim detectors."""
    found = set()
    for widths in (GP_WIDTHS, MGP_WIDTHS):
        for name, width in widths.items():
            head = width // NHEADS
            if name.endswith("cross_attention"):
                found.add((QUERIES, PIXELS, 2 * head, head))
            elif not name.endswith("ffn"):
                count = PIXELS if name.startswith("encoder") else QUERIES
                found.add((count, count, head, head))
    return sorted(found)


def heads(queries, keys, width, value_width, dtype):
    """As projections leave them: heads side by side within a row."""
    torch.manual_seed(0)
    shapes = ((queries, width), (keys, width), (keys, value_width))
    rows = (torch.randn(2, length, NHEADS * channels, device=CUDA) for length, channels in shapes)
    return [t.to(dtype).unflatten(-1, (NHEADS, -1)).transpose(1, 2) for t in rows]


@pytest.fixture(autouse=True)
def full_float32():
    """Disables TF32, whose products have only three correct digits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@needs_gpu
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_fused_kernel_takes_every_published_width(dtype, masked):
    mask = (torch.arange(PIXELS, device=CUDA) < PIXELS - 100)[None, None, None] if masked else None
    for queries, keys, width, value_width in published():
        tensors = heads(queries, keys, width, value_width, dtype)
        of_keys = None if mask is None else mask[..., :keys] if keys == PIXELS else mask[..., -keys:]
        with torch.no_grad(), sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            found = attend(*tensors, of_keys, 0.0)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            exact = padded_attention(*(t.double() for t in tensors), of_keys, 0.0, (width, value_width))
        torch.testing.assert_close(
            found.double(), exact.transpose(1, 2).flatten(2), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )


@needs_gpu
def test_the_rules_of_the_kernels_are_those_that_the_padding_follows():
    """The memory-efficient kernel accepts widths only after padding; flash attention pads by itself."""
    for dtype in TOLERANCE:
        for queries, keys, *widths in published():
            target = fused_widths(*widths, "cuda", dtype)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                as_is, padded = (
                    SDPAParams(*heads(queries, keys, *pair, dtype), None, 0.0, False, False)
                    for pair in (widths, target)
                )
                assert can_use_efficient_attention(padded)
                assert can_use_efficient_attention(as_is) == (target == tuple(widths)), (dtype, widths)
                if dtype != torch.float32 and widths[0] == widths[1]:
                    assert can_use_flash_attention(as_is)
                    assert can_use_flash_attention(padded)


@needs_gpu
def test_gradients_go_through_the_padding():
    tensors = [t.detach().requires_grad_() for t in heads(QUERIES, PIXELS, 38, 19, torch.float32)]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        found = torch.autograd.grad(attend(*tensors, None, 0.0).square().sum(), tensors)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.grad(padded_attention(*tensors, None, 0.0, (38, 19)).square().sum(), tensors)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-4, rtol=1e-3)


@needs_gpu
def test_the_benchmark_runs_with_graphs(tmp_path):
    modes = ("eager", "graph", "compiled-bf16")
    words = ["--device", "cuda", "--subjects", "demo", "--batches", "1", "--repeats", "2"]
    latency.main([*words, "--modes", *modes, "--output", str(tmp_path)])
    message = json.loads((tmp_path / "latency_cuda.json").read_text())
    assert {case["mode"] for case in message["cases"]} == set(modes)
    assert len(message["cases"]) == 2 * len(modes)
    assert all(case["ms_transformer"] > 0 for case in message["cases"])
