"""Made-up results to draw, and what a figure shows."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastmono.metrics import NAMES, monosemanticity, single_feature_activations
from fastmono.spec import Grid, ModelSpec
from fastmono.store import checkpoint_steps, final_loss, logged_steps

BASE = ModelSpec(n_features=24, d_embed=8, n_neurons=48, feature_prob=1 / 8, batch_size=64, steps=4096)


def fake_run(grid, diverged=(), pending=(), diverges_at=100):
    """A run of made-up, seeded results in the shapes of `fastmono.Run`; monosemanticity grows with lr and k."""
    rng = np.random.default_rng(7)
    logged = torch.cat([logged_steps(s.steps) for s in grid]).unique()
    checkpoints = torch.tensor(sorted({c for s in grid for c in checkpoint_steps(s.steps)}))
    losses = torch.full((len(grid), len(logged)), math.nan)
    measures = {name: torch.full((len(grid), len(checkpoints)), math.nan, dtype=torch.float64) for name in NAMES}
    params, table = [], []
    for i, spec in enumerate(grid):
        row = {**spec.to_dict(), "status": "done", "diverged_step": None}
        row |= dict.fromkeys(
            ("final_loss", "eval_loss", "mono_neurons", "mono_per_feature", "mono_per_neuron"), math.nan
        )
        row |= dict.fromkeys(("dead_neurons", "mean_bias", "density"), math.nan)
        table.append(row)
        if i in pending:
            params.append(None)
            row["status"] = "pending"
            continue
        k, m, n = spec.n_neurons, spec.d_embed, spec.n_features
        P = torch.tensor(rng.standard_normal((m, n)), dtype=torch.float32)
        P /= P.norm(dim=0)
        share = min(1.0, 0.2 + 0.15 * math.log10(spec.lr / 1e-3) + 0.2 * rng.random())
        W_in = torch.tensor(0.5 * rng.standard_normal((k, m)), dtype=torch.float32)
        b = torch.tensor(0.1 * rng.standard_normal(k) + 0.2 * spec.init_bias, dtype=torch.float32)
        alone = rng.permutation(k)[: int(share * k)]
        features = rng.permutation(max(n, k))[: len(alone)] % n
        W_in[alone] = (1 + torch.rand(len(alone), 1, generator=torch.Generator().manual_seed(i))) * P[:, features].T
        overlap = (P[:, features].T @ P).masked_fill(torch.nn.functional.one_hot(torch.tensor(features), n) > 0, 0)
        b[alone] = -2.05 * overlap.amax(1).clamp_min(0.05)
        params.append({"W_in": W_in, "b": b, "W_out": torch.zeros(spec.d_output, k), "P": P})
        own = logged_steps(spec.steps)
        at = torch.searchsorted(logged, own)
        curve = 0.3 + 0.05 * rng.random() + 3 / (1 + own.double().numpy() / 40)
        if spec.schedule == "published":
            curve *= 1 + 0.15 * np.cos(np.pi * own.double().numpy() / 512)
        losses[i, at] = torch.tensor(curve * np.exp(0.04 * rng.standard_normal(len(own))), dtype=torch.float32)
        at = torch.searchsorted(checkpoints, torch.tensor(checkpoint_steps(spec.steps)))
        progress = torch.linspace(0, 1, len(at), dtype=torch.float64)
        sfa = single_feature_activations(params[-1], spec.activation)
        count = int((monosemanticity(sfa) > 0.999).sum())
        last = {"mono_neurons": count, "mono_per_feature": count / n, "mono_per_neuron": count / k}
        last |= {"mean_bias": float(b.mean()), "eval_loss": 0.31, "dead_neurons": 1, "density": 0.2}
        for name, value in last.items():
            measures[name][i, at] = progress**2 * value
        if i in diverged:
            row |= {"status": "diverged", "diverged_step": diverges_at}
            losses[i, logged >= diverges_at] = math.nan
            for values in measures.values():
                values[i, checkpoints >= diverges_at] = math.nan
        else:
            row |= {**last, "final_loss": final_loss(losses[i][torch.searchsorted(logged, own)], spec.steps)}

    def parameters(i, step=None):
        if params[i] is None:
            raise ValueError(f"model {i} has nothing on disk yet")
        return params[i]

    def subset(models):
        part = Grid.of(models)
        rows = [grid.specs.index(spec) for spec in part]
        return SimpleNamespace(
            specs=part.specs, grid=part, table=[table[i] for i in rows], losses=losses[rows], logged_steps=logged,
            checkpoint_steps=checkpoints, metrics={name: values[rows] for name, values in measures.items()},
            parameters=lambda i, step=None: parameters(rows[i]),
        )  # fmt: skip

    return SimpleNamespace(
        specs=grid.specs, grid=grid, table=table, losses=losses, logged_steps=logged, checkpoint_steps=checkpoints,
        metrics=measures, parameters=parameters, subset=subset, engine="cpu", precision="fp32", about={},
    )  # fmt: skip


def texts(figure):
    found = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.findobj(Text)]
    return [text for text in found if text]


def curves(ax):
    """The lines of an axes that show data: not the markers of divergence, not lines across the axes."""
    return [line for line in ax.lines if line.get_marker() != "X" and line.get_transform() == ax.transData]


def xy(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def assert_readable(figure):
    """Not blank, nothing beyond the figure's edges, no two tick labels of an axis on top of each other."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    assert pixels.std() > 3
    box = figure.get_tightbbox()
    assert min(box.x0, box.y0) >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01
    for ax in figure.axes:
        boxes = [label.get_window_extent() for label in ax.get_xticklabels() if label.get_text()]
        assert all(a.x1 <= b.x0 or a.y1 <= b.y0 for a, b in itertools.pairwise(boxes))
