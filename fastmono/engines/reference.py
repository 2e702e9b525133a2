"""The reference engine: the whole method in plain PyTorch, one model at a time; the truth that others must match.

    f sparse features [B, N]     x = f P^T [B, m]     z = x W_in^T + b [B, k]     h = phi(z)     y = h W_out^T [B, o]

    e = y - tau(f)                    loss = (1/B) sum e^2           (the logged loss leaves out (l1/B) sum |h|)
    dW_out = (2/B) e^T h              dh = (2/B) e W_out + (l1/B) sign(h)
    dz = dh * phi'(z)                 dW_in = dz^T x                 db = sum of dz over samples

With a linear path of rank r

    l = x L_in^T [B, r]               y = h W_out^T + l L_out^T
    dL_out = (2/B) e^T l              dl = (2/B) e L_out             dL_in = dl^T x

The factor 2/B is kept out of dh and dz until the sums are done: in half precision it would push e into subnormals.
A precision rounds the operands of these products and nothing else: (f, P), (f, P2), (x, W_in), (h, W_out), (e, W_out),
(e, h), (dz, x), (x, L_in), (l, L_out), (e, L_out), (e, l), (dl, x); the loss and db use unrounded values.

Models are not stacked into one `bmm`: the bits of a stacked operator may depend on how many models are in the stack
(vectorised loops end where the stack does, reductions choose their strategy by its size); a model's result must not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmono.block import PRECISIONS, Block, Model, single_thread, views
from fastmono.optim import (
    adamw_,
    bias_factor,
    decay_strength,
    lamb_,
    learning_rates,
    relative_change,
    sgd_,
    spread,
)
from fastmono.philox import FeatureSampler, stream_key
from fastmono.spec import ModelSpec
from fastmono.tasks import ACTIVATION, DERIVATIVE, Elementwise, target


def loss_and_gradients(
    model: Model, f: Tensor, rounded: Elementwise = PRECISIONS["fp32"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logged loss (a scalar) and the gradient of each trained tensor, for features f [B, N]."""
    spec, linear = model.spec, model.spec.linear_path > 0
    W_in, b, W_outT = (model.tensors[name] for name in ("W_in", "b", "W_outT"))
    x = rounded(f) @ rounded(model.P).T  # [B, N] @ [N, m] -> [B, m]
    tau = target(spec.task, f, model.P2, rounded)  # [B, o]

    z = rounded(x) @ rounded(W_in).T + b  # [B, m] @ [m, k] -> [B, k]
    h = ACTIVATION[spec.activation](z)
    e = rounded(h) @ rounded(W_outT) - tau  # [B, k] @ [k, o] -> [B, o]
    if linear:
        L_in, L_outT = rounded(model.tensors["L_in"]), rounded(model.tensors["L_outT"])
        l = rounded(rounded(x) @ L_in.T)  # [B, m] @ [m, r] -> [B, r]  # noqa: E741
        e += l @ L_outT  # [B, r] @ [r, o] -> [B, o]
    loss = e.square().sum() / spec.batch_size

    dh = rounded(e) @ rounded(W_outT).T  # [B, o] @ [o, k] -> [B, k]; this and dz in units of 2/B
    if spec.l1:
        dh += (spec.l1 / 2) * h.sign()
    dz = dh * DERIVATIVE[spec.activation](z)
    unit = 2 / spec.batch_size
    gradients = {
        "W_in": unit * (rounded(dz).T @ rounded(x)),  # [k, B] @ [B, m] -> [k, m]
        "b": unit * dz.sum(0),
        "W_outT": unit * (rounded(h).T @ rounded(e)),  # [k, B] @ [B, o] -> [k, o]
    }
    if linear:
        dl = rounded(rounded(e) @ L_outT.T)  # [B, o] @ [o, r] -> [B, r]
        gradients["L_in"] = unit * (dl.T @ rounded(x))  # [r, B] @ [B, m] -> [r, m]
        gradients["L_outT"] = unit * (l.T @ rounded(e))  # [r, B] @ [B, o] -> [r, o]
    return loss, gradients


def update(model: Model, gradients: dict[str, Tensor], lr: float, step: int) -> None:
    """One optimizer step and bias decay, in place; `step` updates were made before."""
    spec = model.spec
    first, second = (views(spec, moment) if len(moment) else {} for moment in (model.first_moment, model.second_moment))
    strength = decay_strength(spec, step)
    weights = [model.tensors[name] for name in ("W_in", "W_outT")]
    before = [p.clone() for p in weights] if strength and spec.bias_decay_mode == "rate" else []
    for name, p in model.tensors.items():
        if spec.optimizer == "lamb":
            lamb_(p, gradients[name], first[name], second[name], lr)
        elif spec.optimizer == "adamw":
            adamw_(p, gradients[name], first[name], second[name], lr, step)
        else:
            sgd_(p, gradients[name], lr)
    b = model.tensors["b"]
    if not strength:
        b.mul_(bias_factor(spec, step))
    elif spec.bias_decay_mode == "per_neuron":
        b.mul_(1 - strength * spread(model.tensors["W_outT"]))
    else:
        b.mul_(1 - strength * relative_change(before, weights))


class ReferenceEngine:
    """Trains with the functions above.

    Args:
        precision: fp32, tf32 or bf16; applies to float32 models (float64 ones, for tests, are never rounded).
            `ValueError` for any other.
    """

    name = "reference"

    def __init__(self, precision: str = "fp32") -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r}: must be one of {', '.join(PRECISIONS)}")
        self.precision = precision
        self.samplers: dict[object, FeatureSampler] = {}

    def advance(self, block: Block, n_steps: int) -> Tensor:
        """Train every model for n steps, in place. Returns losses, float32 [A, n]: NaN where a model did not train."""
        losses = torch.full((len(block.models), n_steps), torch.nan)
        rates = [learning_rates(spec, block.step, n_steps) for spec in block.specs]
        with single_thread(), torch.no_grad():
            for t in range(n_steps):
                batches: dict[object, Tensor] = {}
                for i in block.active():
                    model = block.models[i]
                    key = stream_key(model.spec)
                    if key not in batches:
                        batches[key] = self._sampler(model.spec).batch(block.step, 0, model.spec.batch_size)
                    f = batches[key].to(model.parameters.dtype)
                    rounded = PRECISIONS[self.precision if f.dtype == torch.float32 else "fp32"]
                    loss, gradients = loss_and_gradients(model, f, rounded)
                    update(model, gradients, rates[i][t], block.step)
                    losses[i, t] = loss
                    if not (loss.isfinite() and model.parameters.isfinite().all()):
                        model.diverged_step = block.step + 1
                block.step += 1
        return losses

    def _sampler(self, spec: ModelSpec) -> FeatureSampler:
        key = stream_key(spec)
        if key not in self.samplers:
            self.samplers[key] = FeatureSampler(spec)
        return self.samplers[key]

    def fetch(self, block: Block) -> None:
        """Nothing to do: the block's models are where they are trained."""

    @staticmethod
    def workspace_bytes(spec: ModelSpec, n_streams: int) -> int:
        """Memory beyond the models' own state that one step takes at most."""
        sampled, linear = (1 + n_streams) * spec.n_features, 4 * spec.linear_path
        return (
            4
            * spec.batch_size
            * (sampled + 3 * spec.n_features + 3 * spec.d_embed + 6 * spec.n_neurons + 4 * spec.d_output + linear)
        )
