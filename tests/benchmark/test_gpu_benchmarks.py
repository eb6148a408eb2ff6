"""GPU benchmarks where there is no GPU: what they count, what they conclude, and that they say what they need."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from minicache_trt.config import ModelConfig
from minicache_trt.contract import plan_layout
from minicache_trt.errors import UserError
from minicache_trt.kernels.library import KernelLibrary
from tests.support.plugin_build import NVCC

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["kernels.py", "end_to_end.py"])
def test_without_a_gpu_a_line_says_so(script: str) -> None:
    result = subprocess.run([sys.executable, FOLDER / script, "--quick"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "needs an NVIDIA GPU" in result.stderr and "Traceback" not in result.stderr


def test_bytes_of_decoding(module: Any) -> None:
    costs, plans = module("kernel_costs"), module("kernel_plans")
    config = plans.MODELS["Llama-2-7B 32/32/128"]
    full = plans.plan_of("full", config)
    context = costs.Context.of(4096, full.compresses)
    queries = 3 * 2 * 32 * 128 * 2
    assert costs.decode_bytes(config, full, 3, context) == 3 * 4096 * 2 * 32 * 128 * 2 + queries
    kivi = plans.plan_of("kivi4", config)
    context = costs.Context.of(4096, kivi.compresses)
    assert (context.compressed, context.exact) == (4032, 64)
    # 4 bits; keys: a scale and a minimum per channel and block, values: per token.
    keys, values = 32 * (64 * 64 + 2 * 128 * 2), 32 * (64 * 64 + 2 * 64 * 2)
    exact = 64 * 2 * 32 * 128 * 2
    assert costs.decode_bytes(config, kivi, 3, context) == 3 * (63 * (keys + values) + exact) + queries
    pairs = plans.plan_of("int4 pairs", config)
    stored = 32 * (64 * 64 + 2 * 64 * 2)
    assert costs.decode_bytes(config, pairs, 3, context) == 3 * (63 * 2 * stored + exact) + queries


def test_bytes_of_the_codec_and_operations_of_prefill(module: Any) -> None:
    costs, plans = module("kernel_costs"), module("kernel_plans")
    config = ModelConfig("llama", 4, 64, 64, 4, 2, 64, 100, 4096)
    layout = next(x for x in plan_layout(plans.plan_of("minicache", config), config) if len(x.stream.layers) == 2)
    vectors, retained = 64 * 2 * 64 * 2, layout.stream.retained * 2 * 64 * 2
    index, norms = layout.stream.retained * 2, 2 * 64 * 2
    assert costs.compress_bytes(layout, 5) == 5 * (2 * vectors + vectors + 2 * norms + 2 * retained + index)
    assert costs.restore_bytes(layout, 5) == 5 * (vectors + norms + retained + index + vectors)
    assert costs.prefill_flops(config, 0, 2) == 4 * 4 * 64 * 3
    assert costs.prefill_flops(config, 10, 2) == 4 * 4 * 64 * 23


def test_every_measurement_runs(module: Any, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host build, each call once: shapes, tables and plans fit the kernels."""
    kernels: ModuleType = module("kernels")

    def once(run: Any, repeats: int = 1) -> float:
        result = run()
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            assert torch.isfinite(result).all()
        return 1e-3

    config = ModelConfig("llama", 2, 128, 128, 4, 2, 64, 100, 4096)
    monkeypatch.setattr(kernels, "MODELS", {"small": config})
    selection = kernels.Selection(models=("small",))
    monkeypatch.setattr(kernels, "CHUNK", 128)
    monkeypatch.setattr(kernels, "seconds", once)
    monkeypatch.setattr(kernels, "CudaRecorder", lambda: lambda run: run)
    monkeypatch.setattr(kernels, "decode_baselines", lambda *arguments: ("flash", 2e-3))
    monkeypatch.setattr(kernels, "flash_prefill_seconds", lambda *arguments: 1e-3)
    bench = kernels.Bench(host_library, torch.device("cpu"), 1e12, 3, selection)
    rows = [
        *kernels.decode_rows(bench, [(2, 300), (1, 64)]),
        *kernels.codec_rows(bench, 3),
        *kernels.prefill_rows(bench, (0, 256)),
    ]
    assert {row.op for row in rows} == {"decode", "compress", "restore", "prefill"}
    assert len(rows) == 2 * len(kernels.PLANS) + 2 * 2 * (len(kernels.PLANS) - 1) + 4
    assert rows[0].cells()[-1] == "2.00x flash" and rows[-1].share == pytest.approx(1.0)


def test_each_call_once_for_a_profiler(
    module: Any, host_library: KernelLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: ModuleType = module("kernels")
    ranges: list[str] = []
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", ranges.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(kernels, "MODELS", {"small": ModelConfig("llama", 2, 128, 128, 4, 2, 64, 100, 4096)})
    selection = kernels.Selection(("decode", "compress"), ("small",), ("full", "kivi4"))
    bench = kernels.Bench(host_library, torch.device("cpu"), 1e12, 0, selection)
    monkeypatch.setattr(kernels, "QUICK_DECODES", ((1, 70),))
    rows = [*kernels.rows_of(bench, quick=True)]
    assert ranges == [row.name for row in rows]
    assert [(row.op, row.plan) for row in rows] == [
        *(("decode", plan) for plan in ("full", "kivi4")),
        *2 * [("compress", "kivi4")],
    ]


def test_what_is_measured_is_chosen(module: Any) -> None:
    choice = module("kernel_selection")
    selection = choice.Selection.of("prefill,decode", "", "kivi4, full")
    assert selection == choice.Selection(("decode", "prefill"), tuple(choice.MODELS), ("full", "kivi4"))
    with pytest.raises(UserError, match="--plans: unknown 'kivi5'"):
        choice.Selection.of("", "", "kivi5")


def test_peaks_are_compared(module: Any) -> None:
    end_to_end = module("end_to_end")
    rows = [
        end_to_end.Row("Hugging Face", 64, 10.0, 30 << 30),
        end_to_end.Row("Hugging Face", 128, 30.0, 40 << 30),
        end_to_end.Row("full", 128, 10.0, 36 << 30),
        end_to_end.Row("kivi4", 128, 8.0, 20 << 30),
        end_to_end.Row("kivi4", 256, 10.0, 24 << 30),
    ]
    hf, full, kivi = end_to_end.summary(rows)
    assert hf[:3] == ["Hugging Face", 64, f"{64 * 338 / 10:.0f}"]
    assert full[3:] == ["2.00x", "1.00x", "36.0", "-10 %"]
    assert kivi[1] == 256 and kivi[3:] == ["4.00x", "2.00x", "20.0", "-50 %"]


def test_the_budget_goes_to_the_cache(module: Any) -> None:
    end_to_end = module("end_to_end")
    config = end_to_end.cache_config(80 * 10**9, 14 * 10**9, 256)
    assert config.max_bytes == int(0.9 * 66 * 10**9) and config.active_prefills * 6 >= 256


@pytest.mark.skipif(NVCC is None, reason="needs nvcc: install the CUDA toolkit (12.8 or later) and put it on PATH")
def test_instructions_are_counted(module: Any) -> None:
    script = module("instructions")
    counter, model = script.Counter.built(), "Llama-3-8B 32/8/128"
    rows = [*script.decode_rows(counter, model, "kivi4", 1, 128), *script.codec_rows(counter, model, "kivi4", 1)]
    kernels = [
        "FullSplit",
        "CompressedSplit",
        "CombineSplits",
        "all",
        *2 * ["MapFragments", "RestoreKernel", "CompressKernel"],
    ]
    assert [row.kernel for row in rows] == kernels
    assert all(row.instructions > 1000 and row.shared_turns >= row.shared_turns_at_best for row in rows)
    # Twice the history, twice the splits' work and little more: one more split of the same size would be too much.
    short, long = (
        {row.kernel: row.instructions for row in script.decode_rows(counter, model, "full", 1, tokens)}
        for tokens in (512, 1024)
    )
    assert 1.99 < long["FullSplit"] / short["FullSplit"] < 2.01


# As nvdisasm writes it: an outer loop around an inner one, the branch to itself that ends every kernel, another kernel.
MACHINE_CODE = """
	.section	.text._ZN9minicache5enterINS_13RestoreKernelINS_4HalfELi4ELb0EEENS_1AIS2_EEEEvT0_,"ax",@progbits
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   IMAD.MOV.U32 R8, RZ, RZ, R4 ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R12, R8, R10, R12 ;
        /*0030*/              @!P0 LDS.64 R10, [R20+0x40] ;
        /*0040*/                   MUFU.EX2 R21, R22 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/                   LOP3.LUT R1, R2, 0xf, RZ, 0xc0, !PT ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/               @P2 BRA `(.L_x_3) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;
	.section	.text._ZN9minicache5enterINS_10LossKernelINS_8BFloat16EEENS_1AIS2_EEEEvT0_,"ax",@progbits
        /*0000*/                   EXIT ;
"""


def test_loops_of_machine_code(module: Any) -> None:
    machine_code = module("machine_code")
    kernels = dict(machine_code.kernels_of(MACHINE_CODE))
    names = module("kernel_names").kernel_names([*kernels])
    assert names == ["RestoreKernel<Half, 4, false>", "LossKernel<BFloat16>"]
    inner, outer = (loop for symbol, code in kernels.items() for loop in machine_code.loops_of(symbol, code))
    assert (inner.first, inner.last, outer.first, outer.last) == (2, 5, 0, 8)
    assert inner.kinds == {"tensor": 1, "shared": 1, "special": 1, "control": 1}
    assert outer.kinds == inner.kinds | {"memory": 1, "moves": 1, "float": 1, "integer": 1, "control": 2}
    # kernel, first, size; tensor, moves, shared, memory, special, float, control, integer
    assert outer.cells()[1:] == [0, 9, 1, 1, 1, 1, 1, 1, 2, 1]
