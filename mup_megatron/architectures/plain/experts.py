"""Experts in plain torch: every token reaches its experts, however many others do."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mup_megatron.architectures.model_file import ModelFile
from mup_megatron.architectures.plain.common import with_loss
from mup_megatron.architectures.plain.mlp import PlainMlp


class PlainExperts(nn.Module):
    """A router, experts, and a shared expert. A batch is balanced as one: Megatron's micro-batch."""

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        self.router = Router(model)
        assert model.num_experts is not None
        expert = model.model_copy(update={"ffn_hidden_size": model.expert_ffn_size})
        self.experts = nn.Module()
        self.experts.local_experts = nn.ModuleList(PlainMlp(expert) for _ in range(model.num_experts))
        if model.has_shared_expert:
            self.shared_experts = SharedExpert(model)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x)
        tokens, found = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        experts: Any = self.experts.local_experts
        for index, expert in enumerate(experts):
            chosen = weights[:, index].nonzero()[:, 0]
            given = expert(tokens[chosen]) * weights[chosen, index, None]
            found = found.index_add(0, chosen, given)
        found = found.view_as(x)
        return found + self.shared_experts(x) if hasattr(self, "shared_experts") else found


class SharedExpert(PlainMlp):
    """An MLP that every token passes, and a gate of one number for each token."""

    def __init__(self, model: ModelFile) -> None:
        super().__init__(model.model_copy(update={"ffn_hidden_size": model.moe_shared_expert_intermediate_size}))
        self.gate_weight = nn.Parameter(torch.zeros(1, model.hidden_size)) if model.moe_shared_expert_gate else None

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if self.gate_weight is None else found * functional.linear(x, self.gate_weight).sigmoid()


class Router(nn.Module):
    """Tokens [batch, sequence, hidden] → weights [tokens, experts], 0 for all but the experts of a token.

    What balances the experts is a loss of its own, whose gradient joins in the backward pass, or a bias on the scores
    by which they are chosen, which `rebalance` moves.
    """

    def __init__(self, model: ModelFile) -> None:
        super().__init__()
        assert model.num_experts is not None
        self.model, self.experts, self.k = model, model.num_experts, model.moe_router_topk
        self.weight = nn.Parameter(torch.zeros(self.experts, model.hidden_size))
        self.bias = nn.Parameter(torch.zeros(self.experts)) if model.add_bias_linear else None
        if model.moe_router_enable_expert_bias:
            self.register_buffer("expert_bias", torch.zeros(self.experts))
            self.register_buffer("seen", torch.zeros(self.experts), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = functional.linear(x, self.weight, self.bias).flatten(0, 1)
        if self.training and self.model.moe_z_loss_coeff:
            squares = logits.logsumexp(-1).square()
            logits = with_loss(logits, self.model.moe_z_loss_coeff * squares.mean())
        weights = self._by_sinkhorn(logits) if self._balances_by("sinkhorn") else self._weights(logits)
        if self.training:
            for kind, coefficient in self._balancing():
                weights = with_loss(weights, coefficient * self._imbalance(logits, x.shape[:2], kind))
        if self.model.moe_router_enable_expert_bias and torch.is_grad_enabled():
            self.get_buffer("seen").add_((weights != 0).sum(0))
        return weights

    def rebalance(self) -> None:
        """Moves the bias of each expert against what it had of the tokens since the last time."""
        if self.model.moe_router_enable_expert_bias:
            seen = self.get_buffer("seen")
            self.get_buffer("expert_bias").add_(self.model.moe_router_bias_update_rate * (seen.mean() - seen).sign())
            seen.zero_()

    def _weights(self, logits: Tensor) -> Tensor:
        kind = self.model.moe_router_score_function
        if kind == "softmax":
            scores = logits.softmax(-1) if self.model.moe_router_pre_softmax else logits
            chosen = self._chosen(scores)
            weights = scores.gather(1, chosen)
            weights = weights if self.model.moe_router_pre_softmax else weights.softmax(-1)
        else:
            scores = logits.sigmoid() if kind == "sigmoid" else functional.softplus(logits).sqrt()
            biased = scores + self.get_buffer("expert_bias") if self.model.moe_router_enable_expert_bias else scores
            weights = scores.gather(1, chosen := self._chosen(biased))
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.k > 1 else weights
        if self.model.moe_router_topk_scaling_factor is not None:
            weights = weights * self.model.moe_router_topk_scaling_factor
        return torch.zeros_like(logits).scatter(1, chosen, weights)

    def _chosen(self, scores: Tensor) -> Tensor:
        """The experts of each token: the best k; with groups, the best of the groups whose best ones are best."""
        groups, of_groups = self.model.moe_router_num_groups, self.model.moe_router_group_topk
        if groups is None or of_groups is None:
            return scores.topk(self.k, dim=-1).indices
        grouped = scores.unflatten(-1, (groups, -1))
        best = grouped.topk(self.k // of_groups, dim=-1).values.sum(-1).topk(of_groups, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0]).scatter(-1, best, 1.0).bool()
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2).topk(self.k, dim=-1).indices

    def _by_sinkhorn(self, logits: Tensor) -> Tensor:
        scores = logits.sigmoid() if self.k == 1 else logits.softmax(-1)
        by = balanced(logits.detach()) if self.training else scores
        mask = torch.zeros_like(scores).scatter(1, by.topk(self.k, dim=-1).indices, 1.0)
        return scores * mask

    def _balances_by(self, kind: str) -> bool:
        return self.model.moe_router_load_balancing_type == kind

    def _balancing(self) -> list[tuple[str, float]]:
        kinds, coefficients = self.model.moe_router_load_balancing_type, self.model.moe_aux_loss_coeff
        if isinstance(kinds, tuple) and isinstance(coefficients, tuple):
            return [(kind, value) for kind, value in zip(kinds, coefficients, strict=True) if value]
        if not (isinstance(kinds, str) and isinstance(coefficients, float)):
            return []
        return [(kinds, coefficients)] if coefficients and kinds.endswith("aux_loss") else []

    def _imbalance(self, logits: Tensor, shape: torch.Size, kind: str) -> Tensor:
        """E/k · Σ over experts of (its part of the tokens) · (its mean score); of each sequence, or of all tokens."""
        score = self.model.moe_router_score_function
        scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
        if score == "sqrtsoftplus":
            scores = functional.softplus(logits).sqrt()
        scores = scores if score == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
        counted = torch.zeros_like(scores).scatter(1, scores.topk(self.k, dim=-1).indices, 1.0)
        parts = (shape[0], shape[1]) if kind == "seq_aux_loss" else (1, shape[0] * shape[1])
        means = [each.unflatten(0, parts).mean(1) for each in (counted, scores)]
        return self.experts / self.k * (means[0] * means[1]).sum(-1).mean()


def balanced(logits: Tensor, tolerance: float = 1e-4) -> Tensor:
    """Returns the exponentials of logits, scaled by row and column until all experts weigh alike."""
    costs, tiny = logits.exp(), 1e-8
    rows, columns = torch.ones_like(costs[:, 0]), torch.ones_like(costs[0])
    while True:
        before = columns
        rows = 1.0 / (len(rows) * (columns * costs).sum(1) + tiny)
        columns = 1.0 / (len(columns) * (rows[:, None] * costs).sum(0) + tiny)
        if (before - columns).abs().mean() <= tolerance:
            return columns * costs * rows[:, None]
