"""A frozen BERT for token classification with the adapters of many runs beside each layer.

All K runs go through one forward pass: activations are (K, n, d), the frozen layers act on all of them alike, and each
run's update s·P·Λ·Q is a batched product. What is frozen comes from the model that the task builds; the classifier is
each run's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from rankalloc.methods.planners.planning import layer_shapes

from .factors import Factors

_ATTENTION = ("attention.self.query", "attention.self.key", "attention.self.value")
_OUTPUT, _IN, _OUT = "attention.output.dense", "intermediate.dense", "output.dense"


class FrozenBert:
    """The frozen part of a ``BertForTokenClassification``, on ``device``.

    Attributes:
        shapes: the layers that can be adapted, in the package's order; an adapter's index is its place here.
        bias: of the classifier, (classes,): the classes' log frequencies.
    """

    def __init__(
        self, model: nn.Module, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        config: Any = model.config
        self.shapes = tuple(layer_shapes(model, 1))
        self.index = {shape.name: place for place, shape in enumerate(self.shapes)}
        self.blocks, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.eps, self.act, self.std = config.layer_norm_eps, ACT2FN[config.hidden_act], config.initializer_range
        self.dropout, self.attention_dropout = config.hidden_dropout_prob, config.attention_probs_dropout_prob
        head = config.classifier_dropout
        self.head_dropout = self.dropout if head is None else head
        self.weights = {
            name: value.detach().to(device, dtype, copy=True)
            for name, value in model.get_submodule("bert").state_dict().items() if value.is_floating_point()
        }
        classifier: Any = model.get_submodule("classifier")
        self.bias = classifier.bias.detach().to(device, dtype, copy=True)
        self.width = config.hidden_size

    def logits(
        self, factors: Factors, heads: tuple[torch.Tensor, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor,
        dropout: bool,
    ) -> torch.Tensor:
        """Logits (K, B·T, classes) of tokens ``ids`` (K, B, T) with ``mask`` True where one is not padding.

        Args:
            factors: the adapters of all runs.
            heads: classifiers: weights (K, classes, d) and biases (K, classes).
            dropout: whether dropout is on. Its masks differ from run to run and depend on which runs train together.
        """
        runs, batch, length = ids.shape
        p = self.dropout if dropout else 0.0
        x = F.dropout(self._embedded(ids), p).reshape(runs, batch * length, self.width)
        seen = mask.reshape(runs * batch, 1, 1, length)
        for block in range(self.blocks):
            at = f"encoder.layer.{block}."
            q, k, v = (
                self._linear(at + name, x, factors).view(runs * batch, length, self.heads, -1).transpose(1, 2)
                for name in _ATTENTION
            )
            of_attention = self.attention_dropout if dropout else 0.0
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=of_attention)
            a = a.transpose(1, 2).reshape(runs, batch * length, self.width)
            a = F.dropout(self._linear(at + _OUTPUT, a, factors), p)
            x = self._norm(at + "attention.output.LayerNorm", a + x)
            h = self.act(self._linear(at + _IN, x, factors))
            h = F.dropout(self._linear(at + _OUT, h, factors), p)
            x = self._norm(at + "output.LayerNorm", h + x)
        x = F.dropout(x, self.head_dropout if dropout else 0.0)
        weight, bias = heads
        return torch.baddbmm(bias[:, None], x, weight.mT)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        w, at = self.weights, "embeddings."
        places = w[at + "position_embeddings.weight"][: ids.shape[-1]]
        x = w[at + "word_embeddings.weight"][ids] + places + w[at + "token_type_embeddings.weight"][0]
        return self._norm("embeddings.LayerNorm", x)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (self.width,), self.weights[name + ".weight"], self.weights[name + ".bias"], self.eps)

    def _linear(self, name: str, x: torch.Tensor, factors: Factors) -> torch.Tensor:
        """A frozen layer on x (K, n, d_in), and every run's update of it."""
        out = F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])
        layer = self.index.get("bert." + name)
        rank = 0 if layer is None else factors.widths[layer]
        if not rank:
            return out
        p, q = factors.P[layer][:, :, :rank], factors.Q[layer][:, :rank]
        lam = factors.lam[layer][:, None, :rank]
        return torch.baddbmm(out, torch.bmm(x, q.mT) * (lam * factors.scaling), p.mT)
