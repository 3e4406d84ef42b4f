"""Claims about validation, against sums done by hand from the shard's files, in float64, one window at a time."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moe.analysis.metrics import layer_metrics
from moe.config.balance import BalanceConfig
from moe.config.model import MoEConfig
from moe.data.prepare import prepare
from moe.eval.evaluate import causal_leak, evaluate
from moe.model.transformer import Transformer
from tests.router_presets import presets_of_routers
from tests.small_runs import settings, silent

CONTEXT, K, V = 32, 2, 290
ALL = 10**9  # more tokens than there are


@pytest.fixture(scope="module")
def dataset(corpus):
    """Its tokens have one byte or several, and the end-of-text token none."""
    cfg = settings(corpus, "", {"tokenizer.name": "bpe", "tokenizer.vocab_size": V})
    return prepare(cfg.data, cfg.tokenizer, silent)


@pytest.fixture(scope="module")
def model(corpus):
    """With weights so large that predictions, and the choice of experts, are far from uniform."""
    cfg = settings(corpus, "", {"model.vocab_size": V, "model.init_std": 0.3})
    return Transformer(cfg.model, cfg.router).initialize(3)


def measure(model, dataset, n_tokens=1024, batch_size=3, **keywords):
    return evaluate(
        model, dataset, n_tokens=n_tokens, batch_size=batch_size, backend="torch", autocast=nullcontext, **keywords
    )


def by_hand(model, dataset):
    """(domain, nats, bytes, (L, K) experts) of every target token of every window, in order."""
    tokens = np.fromfile(dataset.folder / "val-00000.bin", "<u2").astype(np.int64)
    table = np.load(dataset.folder / "val-00000.documents.npy")
    total = (len(tokens) - 1) // CONTEXT
    twin = Transformer(model.cfg, model.blocks[0].mlp.router.cfg).double()
    twin.load_state_dict(model.state_dict())
    found = []
    for window in range(total):
        piece = torch.from_numpy(tokens[window * CONTEXT : window * CONTEXT + CONTEXT + 1])
        with torch.no_grad():
            output = twin(piece[None, :-1], backend="reference")
        for t in range(CONTEXT):
            logits = output.logits_BSV[0, t].numpy()
            target = int(piece[t + 1])
            nats = logits.max() + math.log(np.exp(logits - logits.max()).sum()) - logits[target]
            position = window * CONTEXT + t + 1
            document = max(i for i, start in enumerate(table[:, 0]) if start <= position)
            size = 0 if target == dataset.tokenizer.eot else len(dataset.tokenizer.decode_bytes([target]))
            experts = [each.expert[t].tolist() for each in output.routing]
            found.append((dataset.domains[table[document, 1]], nats, size, experts))
    return found


@pytest.fixture(scope="module")
def both(model, dataset):
    return measure(model, dataset, n_tokens=ALL, batch_size=7), by_hand(model, dataset)


def test_loss_and_bits_per_byte_of_each_domain_are_those_summed_by_hand(both):
    result, tokens = both
    assert len(result.val.domains) == 3
    for name, scores in result.val.domains.items():
        own = [(nats, size) for domain, nats, size, _ in tokens if domain == name]
        nats = math.fsum(each for each, _ in own)
        assert scores.tokens == len(own)
        assert scores.loss == pytest.approx(nats / len(own), rel=1e-5)
        assert scores.bpb == pytest.approx(nats / math.log(2) / sum(size for _, size in own), rel=1e-5)


def test_the_windows_have_tokens_of_every_size(both):
    """What makes bits per byte another number than nats per token."""
    sizes = {size for _, _, size, _ in both[1]}
    assert {0, 1, 2} <= sizes


def test_the_total_is_the_token_weighted_mean_of_the_domains(both):
    result, tokens = both
    domains = result.val.domains.values()
    n = sum(each.tokens for each in domains)
    assert n == len(tokens)
    assert result.val.loss == pytest.approx(sum(each.loss * each.tokens for each in domains) / n, rel=1e-12)
    size = sum(size for _, _, size, _ in tokens)
    assert result.val.bpb == pytest.approx(result.val.loss * n / math.log(2) / size, rel=1e-12)


def test_windows_are_means_of_their_tokens_and_their_mean_is_the_total(both):
    result, tokens = both
    means = [math.fsum(t[1] for t in tokens[i : i + CONTEXT]) / CONTEXT for i in range(0, len(tokens), CONTEXT)]
    assert result.windows == pytest.approx(means, rel=1e-5)
    assert np.mean(result.windows) == pytest.approx(result.val.loss, rel=1e-6)


def test_load_counts_the_experts_of_each_domains_tokens(both, dataset):
    result, tokens = both
    assert result.load.layers == [0, 1]
    assert result.load.domains == dataset.domains
    for layer in range(2):
        for i, name in enumerate(dataset.domains):
            expected = [0] * 4
            for domain, _, _, experts in tokens:
                for expert in experts[layer] if domain == name else ():
                    expected[expert] += 1
            assert result.load.counts[layer][i] == expected
            assert sum(expected) == K * result.val.domains[name].tokens


def test_evaluation_is_deterministic(model, dataset):
    first = measure(model, dataset)
    for _ in range(2):
        assert measure(model, dataset) == first


def test_the_batch_size_does_not_matter(model, dataset):
    whole = measure(model, dataset, batch_size=100)
    for batch_size in (1, 7):
        other = measure(model, dataset, batch_size=batch_size)
        assert other.windows == pytest.approx(whole.windows, rel=1e-5)
        assert other.load == whole.load


def test_evaluation_changes_neither_model_nor_generators(model, dataset):
    before = [p.clone() for p in model.parameters()], torch.get_rng_state()
    measure(model, dataset)
    assert all(torch.equal(a, b) for a, b in zip(before[0], model.parameters(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_asking_for_more_tokens_than_there_are_takes_every_window_once(model, dataset):
    tokens = (dataset.folder / "val-00000.bin").stat().st_size // 2
    assert len(measure(model, dataset, n_tokens=ALL, batch_size=64).windows) == (tokens - 1) // CONTEXT


def test_a_stop_gives_up_between_batches(model, dataset):
    asked = []
    assert measure(model, dataset, stop=lambda: bool(asked) or asked.append(1)) is None
    assert asked == [1]


def test_a_domain_without_a_validation_token_is_left_out(model, dataset):
    result = measure(model, dataset, n_tokens=CONTEXT)
    assert len(result.windows) == 1
    assert 1 <= len(result.val.domains) < 3
    assert [sum(row) > 0 for row in result.load.counts[0]] == [name in result.val.domains for name in dataset.domains]


def test_a_dense_model_has_no_load(corpus, dataset):
    cfg = settings(corpus, "", {"model.vocab_size": V, "model.moe": None})
    assert measure(Transformer(cfg.model, cfg.router).initialize(0), dataset).load is None


# Routing over the whole validation set


def test_routing_is_of_the_whole_validation_set(both):
    result, tokens = both
    assert [each.layer for each in result.load.routing] == [0, 1]
    for layer, found in enumerate(result.load.routing):
        count_E = torch.tensor(result.load.counts[layer]).sum(0)
        assert count_E.sum() == K * len(tokens)
        assert found == layer_metrics(layer, count_E, 0, 0, len(tokens))


def test_tokens_that_no_expert_took_are_counted(corpus, dataset):
    """Experts that choose as many tokens as they have room for leave some to nobody."""
    changes = {"router.name": "expert-choice", "balance.aux": 0.0, "model.moe.k": 1}
    cfg = settings(corpus, "", {"model.vocab_size": V, "model.init_std": 0.3} | changes)
    skipping = Transformer(cfg.model, cfg.router, cfg.balance).initialize(0)
    found = measure(skipping, dataset).load.routing[0]
    assert 0 < found.skipped < 1
    assert found.dropped == 0


def test_evaluation_neither_explores_nor_limits_and_leaves_every_module_in_its_mode(corpus, dataset):
    cfg = settings(corpus, "", {"model.vocab_size": V, "model.init_std": 0.3})
    balance = BalanceConfig(capacity=0.5)
    limited, free = (Transformer(cfg.model, cfg.router, each).initialize(3) for each in (balance, BalanceConfig()))
    limited.blocks[0].eval()
    before = [each.training for each in limited.modules()]
    result = measure(limited, dataset)
    assert [each.training for each in limited.modules()] == before
    assert result == measure(free, dataset)
    assert {each.dropped for each in result.load.routing} == {0.0}


def test_the_mode_comes_back_after_an_error(model, dataset):
    with pytest.raises(ValueError, match="backend"):
        evaluate(model, dataset, n_tokens=64, batch_size=2, backend="none", autocast=nullcontext)
    assert all(each.training for each in model.modules())


# The causal leak


def leak_of(make_model, preset, tokens):
    moe = MoEConfig(
        **{"n_experts": 6, "k": 2, "d_expert": 8} | preset.moe | ({"k": 6} if preset.moe.get("k") == "all" else {})
    )
    if preset.router.groups > 1:
        moe.n_experts = 8
    model = make_model(preset.router, torch.float32, balance=preset.balance, moe=moe)
    return causal_leak(model, tokens), model


def test_a_router_leaks_exactly_where_it_says_that_it_is_not_causal(make_model, preset, tokens):
    leak, model = leak_of(make_model, preset, tokens)
    assert leak < 1e-10 if model.routers()[0].causal_in_eval else leak > 1e-6


@pytest.mark.parametrize(
    ("name", "leaks"), [("softmax", False), ("expert-choice", True), ("soft", True), ("expert-choice-threshold", False)]
)
def test_experts_that_choose_among_a_batch_leak_and_those_that_are_chosen_do_not(make_model, tokens, name, leaks):
    leak, _ = leak_of(make_model, presets_of_routers()[name], tokens)
    assert leak > 1e-6 if leaks else leak < 1e-10


def test_separate_documents_do_not_leak_wherever_they_end(make_model, tokens):
    model = make_model()
    model.document_end = int(tokens[0, 4])
    assert causal_leak(model, tokens) < 1e-10


def test_a_dense_model_does_not_leak_and_measuring_changes_nothing(make_model, tokens):
    model = make_model(dtype=torch.float32, moe=None)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    assert causal_leak(model, tokens) < 1e-10
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.training
