"""Megatron-Core without a GPU: what the CPU runtime changes in a process, and that Megatron trains and resumes on it.

Everything that needs the runtime enabled happens in other processes (`run_ranks`, `python`), never in the one that runs
the tests: it stays as torch made it.
"""

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import stock
from support.processes import HANGS_AFTER_S, run_ranks
from support.stock import Layout, Sizes, Training

from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu

GPT3 = Sizes(num_layers=4)
LLAMA = Sizes(
    num_layers=4,
    ffn_hidden_size=96,
    num_query_groups=2,
    normalization="RMSNorm",
    gated_linear_unit=True,
    qk_layernorm=True,
    add_bias_linear=False,
    position_embedding_type="rope",
    tied=False,
)
ONE = Layout()
SPLIT = Layout(tp=2, sequence_parallel=True, distributed_optimizer=True)
DEEP = Layout(tp=2, pp=2, sequence_parallel=True)
CASES = [
    (GPT3, SPLIT),
    (GPT3, Layout(pp=2, vpp=2, distributed_optimizer=True)),
    (LLAMA, DEEP),
    (LLAMA, Layout(dp=2, distributed_optimizer=True)),
]
SELDOM = [(GPT3, DEEP), (LLAMA, Layout(tp=2)), (LLAMA, Layout(pp=2)), (LLAMA, Layout(dp=2))]
"""Parts of the others."""


def describe(value: object) -> str:
    """A test's name for a layout or a model."""
    if isinstance(value, Sizes):
        return "llama" if value.gated_linear_unit else "gpt3"
    assert isinstance(value, Layout)
    words = [f"{name}{getattr(value, name)}" for name in ("tp", "pp", "vpp", "dp") if (getattr(value, name) or 1) > 1]
    words += [name for name in ("sequence_parallel", "distributed_optimizer") if getattr(value, name)]
    return "-".join(words) or "one"


def python(code: str) -> str:
    """Run `code` in a fresh interpreter and return what it prints; fail with its traceback if it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- Adam -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_bitwise_torch(decoupled: bool) -> None:
    """Twenty steps, two groups with their own LR, eps and decay, an LR that changes: not one bit differs."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (11,)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(20)]

    def train(make: object, **kwargs: object) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
        params = [torch.nn.Parameter(tensor.clone()) for tensor in start]
        groups = [
            {"params": params[:1], "lr": 0.01, "eps": 1e-3, "weight_decay": 0.3},
            {"params": params[1:], "lr": 0.02, "weight_decay": 0.0},
        ]
        optimizer = make(groups, lr=0.5, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, **kwargs)  # type: ignore[operator]
        for step, gradient in enumerate(gradients):
            for group in optimizer.param_groups:
                group["lr"] *= 1 - step / 50
            for param, grad in zip(params, gradient, strict=True):
                param.grad = grad.clone()
            optimizer.step()
        return params, optimizer

    ours, optimizer = train(cpu.GroupStepAdam, adam_w_mode=decoupled)
    theirs, reference = train(torch.optim.AdamW if decoupled else torch.optim.Adam)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[mine][moment], reference.state[other][moment])


def test_adam_counts_steps_in_its_groups() -> None:
    """The count is the group's, an empty group's too, and a parameter's state holds the moments alone."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = cpu.GroupStepAdam([{"params": [param]}, {"params": []}])
    for _ in range(3):
        param.grad = torch.ones(3)
        optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [3, 3]
    assert set(optimizer.state[param]) == {"exp_avg", "exp_avg_sq"}


def test_adam_continues_from_its_state() -> None:
    def steps(optimizer: torch.optim.Optimizer, param: torch.nn.Parameter, count: int) -> None:
        for _ in range(count):
            param.grad = param.detach().sin()
            optimizer.step()

    param = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimizer = cpu.GroupStepAdam([param], lr=0.1)
    steps(optimizer, param, 4)
    twin = torch.nn.Parameter(param.detach().clone())
    resumed = cpu.GroupStepAdam([twin], lr=0.7)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, param, 4)
    steps(resumed, twin, 4)
    assert torch.equal(param, twin)


def test_adam_refuses_graph_capture() -> None:
    with pytest.raises(InputError, match="optimizer_cuda_graph"):
        cpu.GroupStepAdam([torch.nn.Parameter(torch.ones(1))], capturable=True)


# --- Switching it on --------------------------------------------------------------------------------------------------

SNAPSHOT = """
import torch, torch.cuda.nvtx, torch.cuda.random
from mup_megatron.megatron import cpu
def snapshot():
    places = [torch, torch.Tensor, torch.cuda, torch.cuda.random, torch.cuda.nvtx, torch.accelerator]
    return {(str(place), name): id(value) for place in places for name, value in vars(place).items()}
"""


def test_a_gpu_leaves_everything_as_it_is() -> None:
    """Where torch reports a GPU (here: is made to), no name of torch changes and Megatron isn't even imported."""
    python(
        SNAPSHOT
        + """
torch.cuda.is_available = lambda: True
before = snapshot()
assert cpu.enable() is False and cpu.is_enabled() is False
assert snapshot() == before
assert cpu.transformer_config_overrides() == {}
import sys
assert not any(name.startswith("megatron.core") for name in sys.modules)
"""
    )


def test_twice_is_once_and_the_process_group_ends() -> None:
    """Enabling again replaces nothing a second time; what the process leaves open is closed when it exits."""
    output = python(
        SNAPSHOT
        + """
import atexit, tempfile
atexit.register(lambda: print("group open at exit:", torch.distributed.is_initialized()))
assert cpu.enable() is True and cpu.is_enabled() is True
once = snapshot()
assert cpu.enable() is True
assert snapshot() == once
folder = tempfile.mkdtemp()
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
"""
    )
    assert output.splitlines() == ["group open at exit: False"]


def test_too_late_is_refused() -> None:
    output = python(
        """
import megatron.core
from mup_megatron.errors import InputError
from mup_megatron.megatron import cpu
try:
    cpu.enable()
except InputError as error:
    print(error)
assert cpu.is_enabled() is False
"""
    )
    assert "before the first `import megatron`" in output


def _placement() -> None:
    for device in ("cuda", "cuda:0", 0, torch.device("cuda"), torch.cuda.current_device()):
        assert torch.zeros(2, device=device).device.type == "cpu"
        assert torch.ones(2).to(device).device.type == "cpu"
        assert torch.ones(2).to(device=device, dtype=torch.bfloat16).dtype == torch.bfloat16
        assert torch.ones(2).new_zeros(3, device=device).device.type == "cpu"
    assert not torch.ones(2).cuda().is_cuda
    assert torch.nn.Linear(2, 2).cuda().weight.type() == "torch.cuda.FloatTensor"
    assert torch.ones(2).bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(2).type(torch.float64).dtype == torch.float64
    with torch.device("meta"):
        assert torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(2, device="meta").is_meta
    _placement_in_backward()


def _placement_in_backward() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(context: object, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

        @staticmethod
        def backward(context: object, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.full((1,), 2.0, device="cuda")

    x = torch.ones(3, requires_grad=True)
    Doubled.apply(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_tensors_meant_for_the_device_are_on_the_cpu() -> None:
    """Also inside backward, where a TorchFunctionMode would be off; and other devices stay what they are."""
    run_ranks(_placement, 1)


def _random_numbers() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    stock.init_parallel(Layout(tp=2))
    common = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        own = torch.rand(4)
    state = torch.cuda.get_rng_state()
    after = torch.rand(4)
    torch.cuda.set_rng_state(state)
    return common, own, after, torch.rand(4)


def test_random_number_tracker() -> None:
    """Megatron's tracker: the default stream is common to tensor-parallel ranks, a forked one is each rank's own."""
    (common, own, after, again), (common_1, own_1, after_1, _) = run_ranks(_random_numbers, 2)
    assert torch.equal(common, common_1)
    assert torch.equal(after, after_1)
    assert torch.equal(after, again)
    assert not torch.equal(own, own_1)
    assert not torch.equal(common, after)


# --- Training ---------------------------------------------------------------------------------------------------------


def _losses(sizes: Sizes, layout: Layout, steps: int) -> list[float]:
    return stock.train(stock.prepare(sizes, layout, Training()), steps)


@pytest.fixture(scope="module")
def reference() -> dict[Sizes, list[float]]:
    return {sizes: run_ranks(_losses, 1, sizes, ONE, 4)[0] for sizes in (GPT3, LLAMA)}


@pytest.mark.parametrize(
    ("sizes", "layout"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in SELDOM)], ids=describe
)
def test_layouts_agree(sizes: Sizes, layout: Layout, reference: dict[Sizes, list[float]]) -> None:
    """From the same weights every layout has the losses of one process, to what another order of fp32 sums leaves."""
    by_rank = run_ranks(_losses, layout.world_size, sizes, layout, 4)
    assert all(losses == by_rank[0] for losses in by_rank)
    assert by_rank[0] == pytest.approx(reference[sizes], abs=1e-5, rel=0)


def test_it_learns() -> None:
    """Twenty steps at a higher LR: the loss leaves ln(64) behind."""
    losses = run_ranks(_learn, 1)[0]
    assert losses[0] == pytest.approx(4.16, abs=0.2)
    assert losses[-1] < losses[0] - 0.3


def _learn() -> list[float]:
    return stock.train(stock.prepare(GPT3, ONE, Training(lr=1e-2, min_lr=1e-2)), 20)


def _norm_gains(sizes: Sizes, layout: Layout) -> dict[str, torch.Tensor]:
    run = stock.prepare(sizes, layout, Training(lr=1e-2))
    stock.train(run, 4)
    parameters = run.chunks[0].module.named_parameters()
    return {name: value.detach().clone() for name, value in parameters if "layernorm" in name}


@pytest.mark.parametrize("sizes", [GPT3, LLAMA], ids=describe)
def test_norms_under_sequence_parallel(sizes: Sizes) -> None:
    """Each rank sees half of the sequence, yet gains and biases stay one parameter: equal bit by bit on both ranks."""
    split, other = run_ranks(_norm_gains, 2, sizes, SPLIT)
    (whole,) = run_ranks(_norm_gains, 1, sizes, ONE)
    assert set(split) == set(other) == set(whole)
    for name, gain in split.items():
        assert torch.equal(gain, other[name]), name
        assert not torch.equal(gain, torch.ones_like(gain)), f"{name} was not trained"
        torch.testing.assert_close(gain, whole[name], rtol=0, atol=1e-4, msg=name)


# --- Resuming ---------------------------------------------------------------------------------------------------------


def _save_and_go_on(layout: Layout, folder: Path) -> list[float]:
    run = stock.prepare(LLAMA, layout, Training())
    stock.train(run, 2)
    stock.save(run, folder)
    return stock.train(run, 3)


def _resume(layout: Layout, folder: Path) -> list[float]:
    # Other weights than those saved, so that whatever isn't loaded shows.
    run = stock.prepare(replace(LLAMA, init_method_std=0.05), layout, Training())
    stock.load(run, folder)
    assert [group["step"] for group in run.optimizer.param_groups] == [2] * len(run.optimizer.param_groups)
    return stock.train(run, 3)


@pytest.mark.parametrize(
    "layout",
    [ONE, SPLIT, pytest.param(Layout(dp=2, distributed_optimizer=True), marks=pytest.mark.slow)],
    ids=describe,
)
def test_resume_is_bitwise(layout: Layout, tmp_path: Path) -> None:
    """New processes that load a torch_dist checkpoint go on with exactly the losses of those that never stopped."""
    uninterrupted = run_ranks(_save_and_go_on, layout.world_size, layout, tmp_path)
    assert run_ranks(_resume, layout.world_size, layout, tmp_path) == uninterrupted


# --- between ranks ----------------------------------------------------------------------------------------------------


def _exchange_by_counts() -> list[float]:
    """As experts do: rank r sends r + 1 rows to each, and says so with tensors."""
    rank = torch.distributed.get_rank()
    sent = torch.full((2 * (rank + 1),), float(rank))
    received = torch.empty(3)
    torch.distributed.all_to_all_single(received, sent, torch.tensor([1, 2]), torch.tensor([rank + 1] * 2))
    return received.tolist()


def test_an_all_to_all_takes_its_sizes_as_tensors() -> None:
    assert run_ranks(_exchange_by_counts, 2) == [[0.0, 1.0, 1.0]] * 2


def _send_what_is_freed() -> bool:
    """The receiver is late: by then the sender has freed the memory and used it again."""
    size = 1 << 16
    if torch.distributed.get_rank() == 0:
        sent = torch.full((size,), 1.0)
        work = torch.distributed.isend(sent, 1)
        sent.data = torch.empty(1)
        others = [torch.full((size,), 2.0) for _ in range(8)]
        torch.distributed.barrier()
        work.wait()
        return len(others) == 8
    torch.distributed.barrier()
    received = torch.empty(size)
    torch.distributed.recv(received, 0)
    return bool((received == 1).all())


def test_what_is_sent_stays_until_it_is_sent() -> None:
    assert run_ranks(_send_what_is_freed, 2) == [True, True]


def _route() -> bool:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    tokens, weight = torch.randn(3, 4), torch.randn(2, 4)
    return torch.equal(router_gating_linear(tokens, weight, None, torch.float32), tokens @ weight.T)


def test_a_router_works_without_transformer_engine() -> None:
    assert run_ranks(_route, 1) == [True]
