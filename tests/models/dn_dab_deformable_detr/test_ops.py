"""The sampling operator: equal to the pure PyTorch form, known to compilers, refusing what does not fit together."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from models.dn_dab_deformable_detr.ops import sample, sample_by_gather, sample_in_pytorch, sampling
from tests.pruning.tiny import VARIANTS, pictures, tiny_detector

OPS = Path(sampling.__file__).parent
SIZES = [4, 6, 3, 2, 1, 1]


def build(folder, **variables):
    """Build the operator for the CPU; return the folder of the library."""
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, "setup.py", "build", "--build-base", folder, "--build-lib", f"{folder}/lib"]
    environment = {**os.environ, "FORCE_CPU": "1", **variables}
    done = subprocess.run(command, cwd=OPS, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return OPS / folder / "lib"


@pytest.fixture(scope="session")
def built():
    """Folder with the compiled operator of these sources, for the CPU; what is up to date is not compiled again."""
    return build("build/tests")


@pytest.fixture
def compiled(built, monkeypatch):
    """`sample` with the compiled operator."""
    monkeypatch.syspath_prepend(built)
    monkeypatch.setattr(sampling, "_compiled_for", None)
    assert "cpu" in sampling.load_operator()


def arguments(channels=5, dtype=torch.float32, batch=2, queries=3, heads=2, points=2, sizes=SIZES):
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    pixels = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    shape = (batch, queries, heads, len(sizes) // 2, points)
    value = torch.randn(batch, pixels, heads, channels, generator=generator).to(dtype)
    locations = (1.6 * torch.rand(*shape, 2, generator=generator) - 0.3).to(wide)
    return value, sizes, locations, torch.rand(shape, generator=generator).to(wide)


def test_the_bilinear_sum_is_that_of_its_definition():
    """Point by point and pixel by pixel, from the equation alone."""
    value, sizes, locations, weights = arguments(dtype=torch.float64)
    expected = torch.zeros(2, 3, 2, 5, dtype=torch.float64)
    starts = [0, 24, 30]
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist():
        height, width = sizes[2 * level], sizes[2 * level + 1]
        x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in range(height):
            for column in range(width):
                near = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                pixel = value[b, starts[level] + row * width + column, h]
                expected[b, q, h] += weights[b, q, h, level, p] * near * pixel
    torch.testing.assert_close(sample_in_pytorch(value, sizes, locations, weights), expected)
    torch.testing.assert_close(sample_by_gather(value, sizes, locations, weights), expected)


def test_sampling_by_gather_reads_no_pixel_for_points_far_outside_of_the_map():
    value, sizes, locations, weights = arguments()
    locations[0, 0] = torch.tensor([-3e9, 2e38])
    locations[0, 1] = float("inf")
    locations[0, 2] = 1 + 1e-7
    expected = sample_in_pytorch(value, sizes, locations.clamp(-9, 9), weights)
    torch.testing.assert_close(sample_by_gather(value, sizes, locations, weights), expected)


def test_every_line_of_the_test_script_is_true(built):
    environment = {**os.environ, "PYTHONPATH": str(built), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "test.py"], cwd=OPS, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) > 40
    assert all(line.endswith("True") for line in lines)


def test_the_test_script_fails_where_a_line_is_not_true(built, tmp_path):
    """A form that is a little off is found; without the operator the script fails, too."""
    (tmp_path / "off.py").write_text(
        f"import sys; sys.path[:0] = [{str(OPS)!r}]; import test\n"
        "exact = test.sample_in_pytorch\n"
        "test.sample_in_pytorch = lambda *given: exact(*given) * (1 + 1e-4)\n"
        "test.TOLERANCE = {test.torch.float32: 1e-5}; test.GRADIENT_CHANNELS = ()\n"
        "sys.exit(test.main())\n"
    )
    for words, path in ((["off.py"], built), ([str(OPS / "test.py")], tmp_path)):
        environment = {**os.environ, "PYTHONPATH": str(path)}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "False" in done.stdout


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_torch_finds_nothing_wrong_with_the_operator(dtype):
    value, sizes, locations, weights = arguments(dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    # Results in 16 bits are rounded differently where a compiler fuses what is around them.
    used = checks[:3] if dtype == torch.bfloat16 else checks
    torch.library.opcheck(torch.ops.dn_detr.sample.default, (inputs[0], sizes, inputs[1], inputs[2]), test_utils=used)
    gradient = torch.randn(2, 3, 2, 5).to(dtype)
    given = (gradient, *(t.detach() if torch.is_tensor(t) else t for t in (value, sizes, locations, weights)))
    torch.library.opcheck(
        torch.ops.dn_detr.sample_backward.default, given, test_utils=("test_schema", "test_faketensor")
    )


@pytest.fixture
def deterministic():
    """Deterministic algorithms, on as many threads as before when the test has ended."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("compiled", "deterministic")
def test_on_the_cpu_it_is_deterministic():
    """Many queries add to the few pixels; the order is the same on every number of threads."""
    value, sizes, locations, weights = arguments(channels=19, queries=300, heads=8)
    gradient = torch.randn(2, 300, 8, 19, generator=torch.Generator().manual_seed(1))
    found = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        result = torch.ops.dn_detr.sample(value, sizes, locations, weights)
        gradients = torch.ops.dn_detr.sample_backward(gradient, value, sizes, locations, weights)
        found.append((result, *gradients))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@pytest.mark.usefixtures("compiled")
def test_compiled_and_exported_it_gives_the_same():
    value, sizes, locations, weights = arguments()

    class Sampling(torch.nn.Module):
        def forward(self, value, locations, weights):
            return 2 * sample(value, sizes, locations, weights)

    expected = Sampling()(value, locations, weights)
    compiled = torch.compile(Sampling(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(value, locations, weights), expected)
    queries = torch.export.Dim("queries", min=1, max=100)
    exported = torch.export.export(
        Sampling(), (value, locations, weights), dynamic_shapes=(None, {1: queries}, {1: queries})
    )
    assert any(node.target is torch.ops.dn_detr.sample.default for node in exported.graph.nodes)
    found = exported.module()(value, locations[:, :2].contiguous(), weights[:, :2].contiguous())
    torch.testing.assert_close(found, expected[:, :2])


@pytest.mark.usefixtures("compiled")
def test_compiled_for_any_size_of_a_level_its_gradients_are_the_same():
    def weighted(value, locations, weights, height, width):
        return sample(value, [height, width], locations, weights) ** 2

    compiled = torch.compile(weighted, backend="aot_eager", fullgraph=True, dynamic=True)
    for height, width in ((4, 6), (5, 7), (2, 9)):
        value, _, locations, weights = arguments(sizes=[height, width])
        inputs = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        found, expected = (
            torch.autograd.grad(form(*inputs, height, width).sum(), inputs) for form in (compiled, weighted)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("differentiated", [0, 2, 3])
def test_any_of_the_arguments_may_need_no_gradient(differentiated):
    given = list(arguments())
    given[differentiated].requires_grad_()
    found, expected = (
        torch.autograd.grad(form(*given).sum(), given[differentiated]) for form in (sample, sample_in_pytorch)
    )
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not sample(*given).requires_grad


@pytest.mark.usefixtures("compiled")
def test_a_second_derivative_is_refused():
    value, sizes, locations, weights = arguments()
    value.requires_grad_()
    (gradient,) = torch.autograd.grad((sample(value, sizes, locations, weights) ** 2).sum(), value, create_graph=True)
    with pytest.raises(RuntimeError, match="the derivative of the backward is not implemented"):
        torch.autograd.grad(gradient.sum(), value)


@pytest.mark.usefixtures("compiled")
def test_transforms_that_differentiate_are_refused():
    value, sizes, locations, weights = arguments()

    def summed(given):
        return sample(given, sizes, locations, weights).sum()

    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match="functorch transforms"):
            transform(summed)(value)
    with pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
        torch.func.jvp(summed, (value,), (value,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivatives are not implemented"):
        summed(forward_ad.make_dual(value, value))


@pytest.mark.usefixtures("compiled")
def test_an_operator_without_gradients_is_not_used(monkeypatch):
    """Versions before registered them in Python, and such a library may still be installed."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(sampling, "_compiled_for", None)
    monkeypatch.setattr(
        torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *words: words[1] != "Autograd" and has_kernel(*words)
    )
    with pytest.warns(UserWarning, match="older sources"):
        assert not sampling.load_operator()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("training", [False, True])
def test_a_detector_computes_the_same_with_and_without_it(training, monkeypatch):
    model, criterion, _ = tiny_detector(VARIANTS["deformable"])
    model.train(training)
    images, targets = pictures()
    found = []
    for compiled_for in (frozenset({"cpu"}), frozenset()):
        monkeypatch.setattr(sampling, "_compiled_for", compiled_for)
        model.zero_grad()
        torch.manual_seed(0)
        loss = criterion.weighted_sum(criterion(model(images, targets if training else None), targets))
        loss.backward()
        gradients = [parameter.grad for parameter in model.transformer.parameters() if parameter.grad is not None]
        found.append(torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def changed(**changes):
    """Arguments of which some are others."""
    value, sizes, locations, weights = arguments()
    given = {"value": value, "sizes": sizes, "locations": locations, "weights": weights}
    return [change(given[name]) if (change := changes.get(name)) else given[name] for name in given]


MISTAKES = {
    "sizes that add up to less": (changed(sizes=lambda s: [4, 5, 3, 2, 1, 1]), "pixels, and value has"),
    "sizes that add up to more": (changed(sizes=lambda s: [4, 7, 3, 2, 1, 1]), "pixels"),
    "a level without pixels": (changed(sizes=lambda s: [4, 6, 3, 2, 0, 1]), "level"),
    "a negative side": (changed(sizes=lambda s: [-4, -6, 3, 2, 1, 1]), "level"),
    "half a level": (changed(sizes=lambda s: s[:-1]), "height and width"),
    "no levels": (changed(sizes=lambda s: []), "height and width"),
    "a level too few": (changed(sizes=lambda s: [4, 6, 7, 1]), "shape"),
    "values without heads": (changed(value=lambda t: t[:, :, 0]), "axes"),
    "other heads": (changed(value=lambda t: t[:, :, :1]), "shape"),
    "another batch": (changed(locations=lambda t: t[:1]), "shape"),
    "three coordinates": (changed(locations=lambda t: torch.cat((t, t[..., :1]), -1)), "shape"),
    "other points": (changed(weights=lambda t: t[..., :1]), "shape"),
    "whole-numbered values": (changed(value=lambda t: t.long()), "value is"),
    "double locations": (changed(locations=lambda t: t.double()), "locations is"),
    "half weights": (changed(weights=lambda t: t.half()), "weights is"),
    "weights elsewhere": (changed(weights=lambda t: t.to("meta")), "weights is on|device"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("form", ["compiled", "pytorch", "fake"])
def test_arguments_that_do_not_fit_are_refused(mistake, form, request, monkeypatch):
    given, message = MISTAKES[mistake]
    if form == "pytorch":
        monkeypatch.setattr(sampling, "_compiled_for", frozenset())
    else:
        request.getfixturevalue("compiled")
    if form == "fake":
        given = [t.to("meta") if torch.is_tensor(t) else t for t in given]
        if mistake == "weights elsewhere":
            pytest.skip("all is on one device there")
    with pytest.raises(RuntimeError, match=message):
        sample(*given)


@pytest.mark.usefixtures("compiled")
def test_a_gradient_that_does_not_fit_is_refused():
    for gradient in (torch.zeros(2, 3, 2, 4), torch.zeros(2, 3, 2, 5).double()):
        with pytest.raises(RuntimeError, match="the gradient"):
            torch.ops.dn_detr.sample_backward(gradient, *arguments())


@pytest.mark.usefixtures("compiled")
def test_a_level_larger_than_float_can_distinguish_is_refused():
    value = torch.zeros(1, 1, 1, 1).expand(1, 2**24 + 1, 1, 1)
    nothing = torch.zeros(1, 0, 1, 1, 1, 2)
    with pytest.raises(RuntimeError, match="expected sides from 1 to"):
        torch.ops.dn_detr.sample(value, [1, 2**24 + 1], nothing, nothing[..., 0])


def test_without_the_extension_the_pure_form_runs_with_one_warning(monkeypatch):
    monkeypatch.setattr(sampling, "_compiled_for", None)
    monkeypatch.setattr(sampling, "MODULE", "no_such_module")
    with pytest.warns(UserWarning, match=r"no compiled sampling .*build the operator with .*setup\.py"):
        found = sample(*arguments())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(sample(*arguments()), found)
    assert torch.equal(found, sample_in_pytorch(*arguments()))


NUMBERS_IN_AN_ERROR = """
import torch, deformable_sampling
try:
    torch.ops.dn_detr.sample(torch.zeros(1, 4, 1, 3), [1, 2], torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="linker options of GNU")
def test_errors_have_their_numbers_with_a_libstdcxx_of_its_own(tmp_path):
    """Its streams write no numbers or crash beside those of PyTorch; compilers newer than the system's link it."""
    library = build(str(tmp_path / "build"), LDFLAGS="-static-libstdc++ -Wl,-Bsymbolic")
    environment = {**os.environ, "PYTHONPATH": str(library)}
    command = [sys.executable, "-c", NUMBERS_IN_AN_ERROR]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "the levels have 2 pixels, and value has 4" in done.stdout, done.stderr
