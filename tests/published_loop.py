"""The loop that fastmono replaces: one model after another, PyTorch modules, autograd, torch-optimizer's LAMB.

Written from the recipe (facts 1 to 10), with random numbers of PyTorch's own, so that it shares nothing with fastmono.
"""

import warnings

import torch
from torch import nn

import fastmono as fm


def projection(n_features, d_embed):
    U = torch.linalg.svd(torch.randn(n_features, d_embed), full_matrices=False)[0]
    return (U / U.norm(dim=1, keepdim=True)).T


def sample(spec, probability):
    present = torch.bernoulli(probability.expand(spec.batch_size, -1))
    return present * torch.rand(spec.batch_size, spec.n_features)


def train_published(spec):
    """Train one model. Returns its losses every 16 steps, float64 [n], and its parameters as `Run.parameters` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_optimizer import Lamb
    torch.set_num_threads(1)  # at these sizes more threads are no faster
    torch.manual_seed(spec.seed)
    P, P2 = projection(spec.n_features, spec.d_embed), projection(spec.n_features, spec.d_embed)
    probability = torch.full((spec.n_features,), spec.feature_prob)
    if spec.frequency == "power_law":
        weights = torch.arange(1, spec.n_features + 1).float() ** -1.1
        probability = (weights * spec.n_features * spec.feature_prob / weights.sum()).clamp(max=1)
    activation = {"relu": torch.relu, "gelu": nn.functional.gelu, "solu": lambda z: z * torch.exp(z)}[spec.activation]
    hidden, output = nn.Linear(spec.d_embed, spec.n_neurons), nn.Linear(spec.n_neurons, spec.d_output, bias=False)
    with torch.no_grad():
        hidden.bias += spec.init_bias
    parameters = [hidden.weight, hidden.bias, output.weight]
    optimizer = Lamb(parameters, lr=spec.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=512)
    losses = []
    for step in range(spec.steps):
        if spec.task == "abs":
            f = sample(spec, probability / 2) - sample(spec, probability / 2)
        else:
            f = sample(spec, probability)
        wanted = {"decoder": lambda f: f, "abs": torch.abs, "reprojector": lambda f: f @ P2.T}[spec.task](f)
        optimizer.zero_grad()
        h = activation(hidden(f @ P.T))
        loss = (output(h) - wanted).square().sum() / spec.batch_size
        (loss + spec.l1 * h.abs().sum() / spec.batch_size).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-optimizer uses overloads that PyTorch deprecates
            optimizer.step()
        schedule.step()
        if step < spec.steps / 2:
            with torch.no_grad():
                hidden.bias *= 1 - spec.bias_decay * spec.lr
        if step % 16 == 0:
            losses.append(loss.item())
    W_in, b, W_out = (parameter.detach() for parameter in parameters)
    return torch.tensor(losses, dtype=torch.float64), {"W_in": W_in, "b": b, "W_out": W_out, "P": P}


def summary(spec, losses, params):
    """Mean loss over the second half of training, monosemantic neurons over N, mean bias."""
    sfa = fm.metrics.single_feature_activations(params, spec.activation)
    share = float((fm.metrics.monosemanticity(sfa) > 0.999).sum()) / spec.n_features
    return [float(losses[len(losses) // 2 :].mean()), share, float(params["b"].mean())]
