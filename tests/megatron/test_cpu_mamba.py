"""Mamba-2 without its kernels: what the CPU runtime puts in their place against two other statements of the layer."""

import sys

import pytest
import torch
from support.planned import built
from support.processes import run_ranks
from support.shapes import MAMBA, batch, gpt, hybrid
from support.stock import Layout
from torch import nn

from mup_megatron.architectures.keys.mamba import MambaSizes
from mup_megatron.architectures.plain.decoder import PlainDecoder
from mup_megatron.architectures.plain.mamba import PlainMamba
from mup_megatron.errors import InputError
from mup_megatron.megatron.cpu.mamba import GatedNorm, convolved_scan, scan

HIDDEN, SIZES = 12, MambaSizes(heads=6, head_dim=4, groups=3, state_dim=5)


def layer(seed: int) -> PlainMamba:
    """A layer with every parameter off its start."""
    torch.manual_seed(seed)
    made = PlainMamba(HIDDEN, SIZES, 4).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return made


def through_kernels(made: PlainMamba, x: torch.Tensor, chunk: int) -> torch.Tensor:
    """The same layer, computed as Megatron's mixer does."""
    y = convolved_scan(
        made.in_proj(x),
        made.conv1d.weight[:, 0],
        made.conv1d.bias,
        made.dt_bias,
        -made.A_log.exp(),
        made.D,
        chunk,
        headdim=SIZES.head_dim,
        ngroups=SIZES.groups,
        norm_before_gate=False,
    )
    norm = GatedNorm(SIZES.inner, group_size=SIZES.inner // SIZES.groups, norm_before_gate=False)
    norm.weight = made.norm.weight
    output: torch.Tensor = made.out_proj(norm(y))
    return output


@pytest.mark.parametrize(("length", "chunk"), [(1, 128), (7, 3), (8, 4), (9, 1), (9, 128)])
def test_the_kernels_compute_the_recurrence_and_its_gradients(length: int, chunk: int) -> None:
    one, other = layer(length), layer(length)
    x = torch.randn(2, length, HIDDEN, dtype=torch.float64)
    outputs = one(x), through_kernels(other, x, chunk)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    for output in outputs:
        (output * weights).sum().backward()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_the_recurrence_is_that_of_transformers() -> None:
    """The mixer of Nemotron-H, whose groups, gate and norm are Megatron's."""
    models = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    configs = pytest.importorskip("transformers.models.nemotron_h.configuration_nemotron_h")
    config = configs.NemotronHConfig(
        hidden_size=HIDDEN,
        mamba_num_heads=SIZES.heads,
        mamba_head_dim=SIZES.head_dim,
        n_groups=SIZES.groups,
        ssm_state_size=SIZES.state_dim,
        conv_kernel=4,
        chunk_size=4,
        use_conv_bias=True,
        layer_norm_epsilon=1e-5,
        time_step_min=1e-12,  # below which it has no steps; Megatron has no limit
        hybrid_override_pattern="M",
    )
    other: nn.Module = models.NemotronHMamba2Mixer(config, layer_idx=0).double()
    own = layer(0)
    # In single precision transformers computes the state.
    other.load_state_dict(own.state_dict())
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    torch.testing.assert_close(other(x), own(x), rtol=1e-5, atol=1e-6)


def test_half_precision_is_computed_in_single() -> None:
    made = layer(0).to(torch.bfloat16)
    x = torch.randn(1, 9, HIDDEN, dtype=torch.bfloat16)
    zxbcdt = made.in_proj(x)
    arguments = (made.conv1d.weight[:, 0], made.conv1d.bias, made.dt_bias.float(), -made.A_log.float().exp(), made.D)
    found = convolved_scan(zxbcdt, *arguments, 4, headdim=4, ngroups=3, norm_before_gate=False)
    assert found.dtype is torch.bfloat16
    exact = [each.float() for each in (zxbcdt, *arguments)]
    expected = convolved_scan(*exact, 4, headdim=4, ngroups=3, norm_before_gate=False)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_what_only_the_kernels_do_is_refused() -> None:
    x, dt, states = torch.ones(1, 4, 2, 3), torch.ones(1, 4, 2), torch.ones(1, 4, 1, 5)
    with pytest.raises(InputError, match="seq_idx is for packed sequences or inference"):
        scan(x, dt, -torch.ones(2), states, states, 4, seq_idx=torch.zeros(1, 4))


# ---- within Megatron -------------------------------------------------------------------------------------------------

MODEL = hybrid(gpt(), "M*-M", **MAMBA)


def megatron_and_plain() -> tuple[list[float], list[str]]:
    """In a rank: losses of the plain model and of Megatron's on both ways through a mixer; modules that are left."""
    _, _, [chunk] = built(MODEL, Layout())
    plain = PlainDecoder(MODEL, dtype=torch.float32)
    from mup_megatron.megatron.names import named_parameters

    tokens, labels = batch(MODEL, 0)
    missing = plain.load_state_dict(dict(named_parameters([chunk], tied=MODEL.tied)), strict=False).missing_keys
    assert missing == ["output_layer.weight"]
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    losses = [nn.functional.cross_entropy(plain(tokens).flatten(0, 1), labels.flatten()).item()]
    for at_once in (True, False):
        for module in chunk.modules():
            if hasattr(module, "use_mem_eff_path"):
                module.use_mem_eff_path = at_once
        losses.append(chunk(tokens, positions, None, labels=labels).mean().item())
    return losses, [name for name in sys.modules if name.startswith("mamba_ssm")]


def test_megatrons_mixer_computes_the_plain_layer_on_both_of_its_ways() -> None:
    [(losses, left)] = run_ranks(megatron_and_plain, 1)
    assert losses[1:] == pytest.approx([losses[0]] * 2, abs=1e-6)
    assert not left, "nobody else finds the pretended package"
