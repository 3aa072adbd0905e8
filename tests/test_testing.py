"""The public test helpers: the error rule refuses what it should, and poison reaches kernels."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiers import TIERS, excess_skips, tier_of

from ppmoe_ops.testing import assert_error_rule, cast_sample, poison_memory


def test_error_rule_accepts_the_plain_result_and_rounding() -> None:
    x = torch.randn(100)
    exact = x.double().exp()
    assert_error_rule(x.exp(), x.exp(), exact)
    assert_error_rule(x.exp().nextafter(torch.tensor(torch.inf)), x.exp(), exact)
    assert_error_rule(torch.empty(0, 3), torch.empty(0, 3), torch.empty(0, 3).double())


def test_error_rule_refuses_a_larger_error_and_names_the_element() -> None:
    x = torch.randn(3, 5)
    wrong = x.exp()
    wrong[1, 2] *= 1.001
    with pytest.raises(AssertionError, match=r"^weights\[1, 2\]: .* > .*2 \* plain's largest"):
        assert_error_rule(wrong, x.exp(), x.double().exp(), name="weights")


@pytest.mark.parametrize(
    ("dtype", "inside", "outside"),
    [(torch.float32, 4e-7, 6e-7), (torch.bfloat16, 0.024, 0.036), (torch.float64, 6e-15, 9e-15)],
)
def test_error_rule_bound(dtype: torch.dtype, inside: float, outside: float) -> None:
    # The exact value is 1, and plain is one eps off; 2 * eps + eps, or 32 eps in float64.
    eps = torch.finfo(dtype).eps
    exact = torch.ones(1).double()
    plain = (exact + (eps if dtype != torch.float64 else 0)).to(dtype)
    assert_error_rule((exact + inside).to(dtype), plain, exact)
    with pytest.raises(AssertionError):
        assert_error_rule((exact + outside).to(dtype), plain, exact)
    assert_error_rule((exact + outside).to(dtype), plain, exact, factor=4.0)


def test_error_rule_wants_non_finite_values_in_place() -> None:
    plain = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    assert_error_rule(plain.clone(), plain, plain.double())
    for position, value in ((0, torch.nan), (0, torch.inf), (1, 1.0), (2, -torch.inf), (3, 1.0)):
        wrong = plain.clone()
        wrong[position] = value
        with pytest.raises(AssertionError, match=rf"result\[{position}\]"):
            assert_error_rule(wrong, plain, plain.double())


def test_error_rule_wants_equal_dtypes_and_shapes() -> None:
    with pytest.raises(AssertionError, match="dtype"):
        assert_error_rule(torch.ones(2).half(), torch.ones(2), torch.ones(2).double())
    with pytest.raises(AssertionError, match="shape"):
        assert_error_rule(torch.ones(2), torch.ones(1), torch.ones(2).double())
    with pytest.raises(AssertionError, match="shape"):
        assert_error_rule(torch.ones(2), torch.ones(2), torch.ones(2, 1).double())


def test_cast_sample_walks_everything_and_makes_leaves() -> None:
    x = torch.ones(3, requires_grad=True)
    sample = ((x * 2, torch.arange(2), "softmax", None, torch.float32, torch.int32), {"bias": x})
    (twice, ids, text, nothing, dtype, integer), options = cast_sample(sample, torch.bfloat16)
    assert twice.dtype == options["bias"].dtype == torch.bfloat16
    assert twice.is_leaf
    assert twice.requires_grad
    assert (ids.dtype, text, nothing) == (torch.int64, "softmax", None)
    assert (dtype, integer) == (torch.bfloat16, torch.int32)
    copy = cast_sample([x], torch.float32)[0]
    assert copy.data_ptr() != x.data_ptr()


def stable_empty(elements: int, integer: bool) -> list[float]:
    """The contents of a tensor fresh from the shim that kernels allocate with."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    element = ctypes.c_int32 if integer else ctypes.c_float
    name = "int32" if integer else "float32"
    dtype = getattr(library, f"aoti_torch_dtype_{name}")()
    handle, data = ctypes.c_void_p(), ctypes.c_void_p()
    size, stride = (ctypes.c_int64 * 1)(elements), (ctypes.c_int64 * 1)(1)
    assert library.aoti_torch_empty_strided(
        ctypes.c_int64(1), size, stride, dtype, 0, 0, ctypes.byref(handle)
    ) == 0  # fmt: skip
    assert library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
    assert data.value is not None
    contents = list((element * elements).from_address(data.value))
    assert library.aoti_torch_delete_tensor_object(handle) == 0
    return contents


@pytest.mark.parametrize("elements", [1, 16, 1000, 300000])
def test_poison_reaches_what_kernels_allocate(elements: int) -> None:
    assert all(value != value for value in stable_empty(elements, integer=False))
    with poison_memory(0x7F):
        assert set(stable_empty(elements, integer=True)) == {0x7F7F7F7F}
    assert set(stable_empty(elements, integer=True)) == {-1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_poison_reaches_what_torch_allocates(dtype: torch.dtype) -> None:
    x = torch.ones(2, 2, dtype=dtype)
    fresh = (
        torch.empty(5, dtype=dtype),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype),
        x.new_empty(7),
    )
    assert all(each.isnan().all() for each in fresh)
    assert torch.equal(torch.empty(3, dtype=torch.int32), torch.full((3,), 2**31 - 1).int())


def test_poison_ends_with_its_block() -> None:
    code = (
        "import torch\n"
        "from ppmoe_ops.testing import poison_memory\n"
        "with poison_memory():\n"
        "    assert torch.empty(3).isnan().all()\n"
        "assert not torch.are_deterministic_algorithms_enabled()\n"
        "blocks = [torch.empty(1000) for _ in range(20)]\n"
        "assert not all(each.isnan().all() for each in blocks)\n"
    )
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_skips_beyond_the_table_are_named() -> None:
    assert [tier.name for tier in TIERS] == ["cpu", "interpret", "compile", "gpu"]
    assert tier_of("tests/test_host.py::test_x").name == "cpu"
    assert tier_of("tests/expert_slice/test_route.py::test_gpu").name == "cpu"
    assert tier_of("tests/gpu/test_x.py::test_y").name == "gpu"
    assert excess_skips([]) == []
    assert excess_skips([("tests/test_x.py::y", "why")]) == [
        "cpu: tests/test_x.py::y was skipped, which is not allowed: why"
    ]
    allowed = [("tests/gpu/test_x.py::y", "no compute-sanitizer here")]
    assert excess_skips(allowed) == []
    assert len(excess_skips(allowed * 100)) == 1


def test_a_run_fails_when_it_skips_too_much(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "tiers.py"):
        (tmp_path / "tests" / name).write_text((here / name).read_text())
    (tmp_path / "tests" / "test_one.py").write_text(
        "import pytest\ndef test_a(): pytest.skip('tired')\ndef test_b(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", "/dev/null"]
    command += ["--rootdir", str(tmp_path), str(tmp_path / "tests")]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for selected, code in (("test_a", 1), ("test_b", 0)):
        run = subprocess.run(
            [*command, "-k", selected],
            cwd=here.parent,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == code, run.stdout + run.stderr
        words = "test_one.py::test_a was skipped, which is not allowed: tired"
        assert (words in run.stdout) == (code == 1)
