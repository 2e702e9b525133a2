"""The random stream: known answers, an independent Philox in Python integers, and the distribution of what is drawn.

Every bound on a statistic is set so that a correct generator passes with probability above 1 - 1e-4, corrected for
the number of statistics; the streams are fixed, so a test that passes once passes always.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from fastmono import philox
from fastmono.philox import FeatureSampler, Purpose, normals, philox4x32, stream_key, uniforms, weight_words
from fastmono.spec import ModelSpec

CHANCE = 1e-4
ONES = 0xFFFFFFFF


def words_of(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as the paper writes it (Salmon et al., SC'11, section 3.3), on Python integers."""
    L0, R0, L1, R1 = counter[1], counter[0], counter[3], counter[2]
    k0, k1 = key
    for i in range(10):
        if i:
            k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
        hi0, lo0 = divmod(0xD2511F53 * R0, 2**32)
        hi1, lo1 = divmod(0xCD9E8D57 * R1, 2**32)
        R0, L0, R1, L1 = hi1 ^ L0 ^ k0, lo1, hi0 ^ L1 ^ k1, lo0
    return R0, L0, R1, L1


def probabilities(spec: ModelSpec) -> list[float]:
    share = spec.feature_prob / 2 if spec.task == "abs" else spec.feature_prob
    n = spec.n_features
    if spec.frequency == "uniform":
        return [share] * n
    weights = [(j + 1) ** -1.1 for j in range(n)]
    return [min(1.0, n * share * w / math.fsum(weights)) for w in weights]


def features_of(spec: ModelSpec, purposes: tuple[int, int], step: int, sample: int) -> np.ndarray:
    """One feature vector by design section 3, in numpy float32 arithmetic, one word at a time."""

    def draw(purpose: int) -> np.ndarray:
        values = np.zeros(spec.n_features, np.float32)
        for j, p in enumerate(probabilities(spec)):
            u = words_of((j // 4, sample, step % 2**32, step // 2**32), (spec.seed, purpose))[j % 4]
            if u < math.floor(p * 2.0**32):
                scale = np.float32(1.0 / (p * 2.0**32))
                value = (np.float32(u) + np.float32(0.5)) * scale
                values[j] = min(value, np.float32(1 - 2.0**-24))
        return values

    return draw(purposes[0]) - draw(purposes[1]) if spec.task == "abs" else draw(purposes[0])


TRAINING, HELD_OUT = (Purpose.FEATURES, Purpose.NEGATIVE_FEATURES), (
    Purpose.EVALUATION_FEATURES,
    Purpose.NEGATIVE_EVALUATION_FEATURES,
)  # fmt: skip


def spec_of(n_features: int = 13, **fields: object) -> ModelSpec:
    return ModelSpec(n_features=n_features, d_embed=1, **{"feature_prob": 0.25, "seed": 5, **fields})  # type: ignore[arg-type]


def equal_bits(a: torch.Tensor, b: np.ndarray) -> bool:
    return a.dtype == torch.float32 and a.shape == b.shape and a.numpy().tobytes() == b.tobytes()


# The cipher.

KNOWN_ANSWERS = [  # kat_vectors of Random123: philox4x32 10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert tuple(int(word) for word in philox4x32(counter, key)) == answer
    assert words_of(counter, key) == answer  # and so does the one that the tests below compare with


def test_philox_on_tensors_equals_python_integers_for_random_and_extreme_counters_and_keys() -> None:
    rng = np.random.default_rng(0)
    counters = rng.integers(0, 2**32, (200, 4))
    counters[:32] = rng.choice([0, 1, 2**31 - 1, 2**31, ONES], (32, 4))
    for key in [(0, 0), (ONES, 3), (2**31, ONES), (12345, 2)]:
        found = torch.stack(philox4x32(tuple(torch.from_numpy(counters.T.copy())), key), 1)
        assert found.dtype == torch.int64
        assert found.tolist() == [list(words_of(tuple(map(int, counter)), key)) for counter in counters]


def test_philox_broadcasts_the_words_of_its_counter() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)
    found = torch.stack(philox4x32((columns, rows, 7, 9), (1, 2)), -1)
    assert found.shape == (3, 5, 4)
    assert found[2, 4].tolist() == list(words_of((4, 2, 7, 9), (1, 2)))
    assert found[1, 0].tolist() == list(words_of((0, 1, 7, 9), (1, 2)))


def test_purposes_are_never_renumbered() -> None:
    assert {purpose.name: int(purpose) for purpose in Purpose} == {
        "PROJECTION": 0,
        "SECOND_PROJECTION": 1,
        "INITIAL_WEIGHTS": 2,
        "FEATURES": 3,
        "NEGATIVE_FEATURES": 4,
        "EVALUATION_FEATURES": 5,
        "NEGATIVE_EVALUATION_FEATURES": 6,
        "ROUND_SEED": 7,
    }


# Weights.


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 11, 400])
def test_weight_words_take_the_counter_index_over_four_and_tensor(count: int) -> None:
    seed, purpose, tensor = 2**32 - 1, Purpose.INITIAL_WEIGHTS, 2
    expected = [words_of((i // 4, tensor, 0, 0), (seed, purpose))[i % 4] for i in range(count)]
    assert weight_words(seed, purpose, tensor, count).tolist() == expected
    drawn = uniforms(seed, purpose, tensor, count)
    assert drawn.dtype == torch.float64
    assert drawn.tolist() == [(word + 0.5) / 2**32 for word in expected]  # exact in float64
    assert drawn.min() > 0 and drawn.max() < 1


@pytest.mark.parametrize("count", [1, 2, 7, 8, 301])
def test_normals_are_box_muller_of_neighbouring_words(count: int) -> None:
    expected = []
    for i in range(count):
        first, second = ((words_of((w // 4, 1, 0, 0), (9, 0))[w % 4] + 0.5) / 2**32 for w in (i - i % 2, i - i % 2 + 1))
        radius, angle = math.sqrt(-2 * math.log(first)), 2 * math.pi * second
        expected.append(radius * (math.sin(angle) if i % 2 else math.cos(angle)))
    found = normals(9, Purpose.PROJECTION, 1, count)
    assert found.dtype == torch.float64 and found.shape == (count,)
    # An angle up to 2 pi, rounded once more or less, moves its sine by 2**-51; the radius is at most 6.8.
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-14, atol=1e-14)


def test_normals_follow_the_normal_distribution_and_are_uncorrelated() -> None:
    n = 40_000
    drawn = normals(3, Purpose.PROJECTION, 0, n).numpy()
    assert scipy.stats.kstest(drawn, "norm").pvalue > CHANCE
    assert scipy.stats.kstest(drawn[::2] ** 2 + drawn[1::2] ** 2, scipy.stats.chi2(2).cdf).pvalue > CHANCE
    bound = scipy.stats.norm.isf(CHANCE / 12)
    for lag in (1, 2, 3, 4):
        assert abs(np.corrcoef(drawn[lag:], drawn[:-lag])[0, 1]) < bound / math.sqrt(n - lag)
    assert abs(np.corrcoef(drawn[::2], drawn[1::2])[0, 1]) < bound / math.sqrt(n / 2)
    assert abs(np.corrcoef(drawn[::2] ** 2, drawn[1::2] ** 2)[0, 1]) < bound / math.sqrt(n / 2)


# Features against the definition, bit by bit.

DISTRIBUTIONS = [
    {},
    {"frequency": "power_law"},
    {"frequency": "power_law", "feature_prob": 0.6},  # clips the commonest
    {"task": "abs"},
    {"task": "abs", "frequency": "power_law", "feature_prob": 0.9},
    {"feature_prob": 1.0},
    {"feature_prob": 1 / 3, "n_features": 1},
    {"feature_prob": 1 / 3, "n_features": 4},
    {"feature_prob": 1 / 3, "n_features": 3, "task": "abs", "seed": 2**32 - 1},
    {"feature_prob": 1 / 3, "n_features": 17, "task": "reprojector", "seed": 0},
]


@pytest.mark.parametrize("fields", DISTRIBUTIONS, ids=str)
def test_features_equal_their_definition_bitwise(fields: dict[str, object]) -> None:
    spec = spec_of(**fields)
    sampler = FeatureSampler(spec)
    for step in (0, 1, 1023, 2**32 - 1, 2**32, 5 * 2**32 + 7, 2**62 + 3):
        expected = np.stack([features_of(spec, TRAINING, step, sample) for sample in range(8)])
        assert equal_bits(sampler.batch(step, 0, 8), expected), step
    expected = np.stack([features_of(spec, HELD_OUT, 0, sample) for sample in range(20)])
    assert equal_bits(sampler.evaluation(0, 20), expected)
    assert np.count_nonzero(expected) > 0


@pytest.mark.parametrize("fields", [{}, {"task": "abs", "frequency": "power_law"}], ids=str)
def test_features_of_samples_at_large_offsets_equal_their_definition(fields: dict[str, object]) -> None:
    spec = spec_of(**fields)
    for first in (8191, 2**16, 2**31 - 8):
        expected = np.stack([features_of(spec, TRAINING, 77, sample) for sample in range(first, first + 6)])
        assert equal_bits(FeatureSampler(spec).batch(77, first, 6), expected)
        expected = np.stack([features_of(spec, HELD_OUT, 0, sample) for sample in range(first, first + 6)])
        assert equal_bits(FeatureSampler(spec).evaluation(first, 6), expected)


def test_features_at_the_end_of_a_wide_row_equal_their_definition() -> None:
    # N / 4 above the sampler's tile of 2**15 counters: one row a pass.
    n = 140_001
    found = FeatureSampler(spec_of(n_features=n, feature_prob=0.5)).batch(3, 4, 2)
    expected = np.zeros((2, 9), np.float32)
    for row, column in np.ndindex(2, 9):
        j = n - 9 + column
        u = words_of((j // 4, 4 + row, 3, 0), (5, Purpose.FEATURES))[j % 4]
        if u < 2**31:
            expected[row, column] = min((np.float32(u) + np.float32(0.5)) * np.float32(2.0**-31), 1 - 2.0**-24)
    assert equal_bits(found[:, -9:].contiguous(), expected)
    assert 0 < np.count_nonzero(expected) < 18


@pytest.mark.parametrize("task", ["decoder", "abs"])
@pytest.mark.parametrize("tile", [None, 1, 7, 64])
def test_features_do_not_depend_on_how_samples_are_cut(
    task: str, tile: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(n_features=37, task=task)
    whole, held_out = FeatureSampler(spec).batch(9, 0, 101), FeatureSampler(spec).evaluation(0, 101)
    if tile:
        monkeypatch.setattr(philox, "TILE", tile)
    sampler = FeatureSampler(spec)
    for cuts in ([0, 101], [0, 1, 2, 50, 101], list(range(102))):
        parts = [(first, stop - first) for first, stop in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat([sampler.batch(9, *part) for part in parts]), whole)
        assert torch.equal(torch.cat([sampler.evaluation(*part) for part in parts]), held_out)
    assert sampler.batch(9, 5, 0).shape == (0, 37)


def test_features_are_written_where_asked() -> None:
    spec = spec_of(task="abs")
    sampler, out = FeatureSampler(spec), torch.full((12, 13), torch.nan)
    assert sampler.batch(2, 3, 10, out[1:11]).data_ptr() == out[1:11].data_ptr()
    assert torch.equal(out[1:11], sampler.batch(2, 3, 10))
    assert out[[0, 11]].isnan().all()  # and nowhere else


@pytest.mark.parametrize(
    "prob", [1.0, math.nextafter(1.0, 0.0), 0.999, 0.5, 1 / 3, 1 / 64, 1e-5, 3 * 2.0**-32, 2.0**-32]
)
def test_extreme_words_give_values_strictly_inside_zero_and_one(prob: float, monkeypatch: pytest.MonkeyPatch) -> None:
    threshold = math.floor(prob * 2.0**32)
    words = [0, 1, threshold - 2, threshold - 1, threshold, threshold + 1, ONES - 1, ONES]
    words = [min(max(word, 0), ONES) for word in words]

    def fixed(counter: tuple[object, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        groups, samples = counter[0], counter[1]
        assert isinstance(groups, torch.Tensor) and isinstance(samples, torch.Tensor)
        table = torch.tensor(words).view(2, 4)
        return tuple(table[groups, i].expand(len(samples), -1) for i in range(4))

    monkeypatch.setattr(philox, "philox4x32", fixed)
    found = FeatureSampler(spec_of(n_features=8, feature_prob=prob)).batch(0, 0, 2)
    for row in found:
        for word, value in zip(words, row, strict=True):
            if word < threshold:
                assert 0.0 < float(value) < 1.0, (word, float(value))
            else:
                assert float(value) == 0.0 and math.copysign(1, float(value)) == 1


def test_probability_one_makes_every_feature_present() -> None:
    f = FeatureSampler(spec_of(n_features=50, feature_prob=1.0)).batch(0, 0, 400)
    assert f.min() > 0 and f.max() < 1
    clipped = FeatureSampler(spec_of(n_features=512, feature_prob=1 / 64, frequency="power_law")).batch(0, 0, 4096)
    assert clipped[:, 0].min() > 0  # p_0 is clipped at 1 at the paper's size
    assert (clipped[:, 1] == 0).any()


# The distribution.


@pytest.mark.parametrize("frequency", ["uniform", "power_law"])
@pytest.mark.parametrize("task", ["decoder", "abs"])
def test_presence_has_its_probability_and_values_are_uniform_given_presence(task: str, frequency: str) -> None:
    n, samples = 16, 20_000
    spec = spec_of(n_features=n, task=task, frequency=frequency, feature_prob=0.1, seed=1)
    f = FeatureSampler(spec).batch(3, 0, samples).numpy().astype(np.float64)
    for j, p in enumerate(probabilities(spec)):
        present = p if task == "decoder" else 1 - (1 - p) ** 2
        count = int(np.count_nonzero(f[:, j]))
        if present < 1:
            assert scipy.stats.binomtest(count, samples, present).pvalue > CHANCE / n, j
        else:
            assert count == samples
        values = np.abs(f[:, j][f[:, j] != 0])
        if task == "decoder":
            assert values.max() < 1
            distribution = scipy.stats.uniform.cdf
        else:  # one of the two present: uniform; both: the difference, whose size has density 2 (1 - x)
            both = p * p / present

            def distribution(x: np.ndarray, both: float = both) -> np.ndarray:
                return (1 - both) * x + both * (1 - (1 - x) ** 2)

            positive = int((f[:, j] > 0).sum())
            assert scipy.stats.binomtest(positive, count, 0.5).pvalue > CHANCE / n, j
        assert scipy.stats.kstest(values, distribution).pvalue > CHANCE / n, j


def test_batches_are_independent_across_features_samples_steps_seeds_and_purposes() -> None:
    n, samples = 9, 4096
    spec = spec_of(n_features=n, feature_prob=1.0)  # uniform on (0, 1): the whole of a word shows
    sampler = FeatureSampler(spec)
    negative = FeatureSampler(spec.replace(task="abs", feature_prob=1.0)).batch(0, 0, samples)
    positive_half = FeatureSampler(spec.replace(feature_prob=0.5)).batch(0, 0, samples)
    negative = positive_half - negative  # f+ - (f+ - f-)
    streams = {
        "step 0": sampler.batch(0, 0, samples),
        "step 1": sampler.batch(1, 0, samples),
        "step 2**31": sampler.batch(2**31, 0, samples),
        "step 2**32": sampler.batch(2**32, 0, samples),
        "step 2**32 + 1": sampler.batch(2**32 + 1, 0, samples),
        "next samples": sampler.batch(0, samples, samples),
        "samples from 2**16": sampler.batch(0, 2**16, samples),
        "held out": sampler.evaluation(0, samples),
        "negative": negative,
        "seed 6": FeatureSampler(spec.replace(seed=6)).batch(0, 0, samples),
        "seed 2**31 + 5": FeatureSampler(spec.replace(seed=2**31 + 5)).batch(0, 0, samples),
    }
    table = torch.cat(list(streams.values()), 1).double().numpy()
    lagged = np.concatenate([table, np.roll(table[:, :n], 1, 0), np.roll(table[:, :n], 4, 0)], 1)
    correlation = np.corrcoef(lagged.T) - np.eye(lagged.shape[1])
    pairs = correlation.size / 2
    # A correlation of n independent pairs has standard deviation 1/sqrt(n).
    assert np.abs(correlation).max() < scipy.stats.norm.isf(CHANCE / pairs / 2) / math.sqrt(samples)
    uniform = torch.cat([rows for name, rows in streams.items() if name != "negative"])
    # 41k rows of nine 24-bit numbers: two equal ones would mean that a counter came twice.
    assert len(torch.unique(uniform, dim=0)) == len(uniform)


def test_evaluation_samples_are_in_no_training_batch() -> None:
    spec = spec_of(n_features=24, feature_prob=0.5)
    sampler = FeatureSampler(spec)
    held_out = {row.numpy().tobytes() for row in sampler.evaluation(0, 512)}
    assert len(held_out) == 512
    for step in range(20):
        assert not held_out & {row.numpy().tobytes() for row in sampler.batch(step, 0, 512)}


def test_models_with_one_stream_key_see_the_same_batches() -> None:
    spec = spec_of(n_features=21)
    same = [
        spec.replace(lr=0.5, init_bias=-1.0, bias_decay=0.1, l1=0.3, steps=7, optimizer="sgd", schedule="cosine"),
        spec.replace(n_neurons=3, d_embed=5, activation="gelu", batch_size=64),
        spec.replace(task="reprojector"),
    ]
    for other in same:
        assert stream_key(other) == stream_key(spec)
        assert torch.equal(FeatureSampler(other).batch(5, 0, 30), FeatureSampler(spec).batch(5, 0, 30))
    different = [
        spec.replace(seed=6), spec.replace(n_features=22), spec.replace(feature_prob=0.26),
        spec.replace(frequency="power_law"), spec.replace(task="abs"),
    ]  # fmt: skip
    assert len({stream_key(other) for other in [spec, *different]}) == len(different) + 1
