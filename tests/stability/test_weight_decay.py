"""Which parameters decay."""

from typing import Any

import pytest
import torch
from torch import nn

from captum_priors.stability import weight_decay_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 6, 3)
        self.norms = nn.Sequential(nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.LayerNorm([6, 9]))
        self.lstm = nn.LSTM(9, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.scale = nn.Parameter(torch.ones(()))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.head = nn.Linear(6, 11)


def names(model: nn.Module, groups: list[dict[str, Any]], decay: float) -> set[str]:
    chosen = {id(p) for g in groups if g["weight_decay"] == decay for p in g["params"]}
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_only_weight_matrices_and_kernels_decay() -> None:
    model = Model()
    groups = weight_decay_groups(model, 0.1)
    decaying = {
        *("conv.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"),
        *("attention.in_proj_weight", "attention.out_proj.weight"),
    }
    assert names(model, groups, 0.1) == decaying
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names(model, groups, 0.0) == trained - decaying
    assert sum(len(g["params"]) for g in groups) == len(trained)  # each once


def test_shared_parameters_come_once_and_decay_as_a_matrix() -> None:
    model = Model()
    model.head.weight = model.embedding.weight
    groups = weight_decay_groups(model, 0.1)
    torch.optim.AdamW(groups)  # refuses parameters in two groups
    assert "embedding.weight" in names(model, groups, 0.1)


def test_empty_groups_are_left_out() -> None:
    assert len(weight_decay_groups(nn.Linear(3, 2, bias=False), 0.1)) == 1
    assert weight_decay_groups(nn.LayerNorm(3), 0.1)[0]["weight_decay"] == 0


def test_negative_decay_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        weight_decay_groups(nn.Linear(2, 2), -0.1)
