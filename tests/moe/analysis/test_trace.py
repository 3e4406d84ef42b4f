"""Claims about a trace: what stands in it against what the model's own forward pass returns, router by router."""

import dataclasses
import json
import tracemalloc

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from moe.analysis.trace import KEY, ROW_GROUP, About, Batch, Recorder, Trace, Writer
from moe.config.model import ModelConfig, MoEConfig
from moe.errors import BadInput
from moe.model.transformer import Transformer, next_token_loss
from tests.router_presets import presets_of_routers

B, S, V, E, K = 3, 16, 32, 6, 2
PRESETS = {name: preset for name, preset in presets_of_routers().items() if name not in ("soft",)}


def _model(name="softmax"):
    router, balance, changes = PRESETS[name]
    moe = MoEConfig(n_experts=E, k=K, d_expert=8)
    if "groups" in name:
        changes = changes | {"n_experts": 8}
    changes = {key: moe.n_experts if value == "all" else value for key, value in changes.items()}
    model = ModelConfig("t", V, S, n_layers=2, d_model=16, n_heads=2, d_ff=16, moe=dataclasses.replace(moe, **changes))
    return Transformer(model, router, balance).initialize(0).eval()


def _about(k=K, n_experts=(E, E), domains=("one", "two")):
    return About(
        "runs/r", "step-1", "f" * 8, V, S, list(range(len(n_experts))), list(n_experts), k, list(domains), "all"
    )


def _text(seed=0):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, V, (B, S + 1))
    place = np.tile(np.arange(S), (B, 1))
    return tokens[:, :-1], tokens[:, 1:], generator.integers(0, 2, (B, S)), np.zeros((B, S), int), place


def _write(folder, model, texts, k=K, n_experts=(E, E)):
    with Writer(folder, _about(k, n_experts)) as writer, Recorder(model, k) as recorder:
        for text in texts:
            writer.add(Batch(*text, *recorder.run(torch.from_numpy(text[0]), torch.from_numpy(text[1]))))


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_every_router_is_in_the_trace(name, tmp_path):
    model, text = _model(name), _text()
    with torch.no_grad():
        output = model(torch.from_numpy(text[0]))
    n_experts = [len(routing.count_E) for routing in output.routing]
    k = K if all(router.fixed_k for router in model.routers()) else max(n_experts)
    k = max([k] + [routing.expert.shape[-1] for routing in output.routing if routing.token_N is None])
    _write(tmp_path / "trace", model, [text], k, n_experts)
    trace = Trace(tmp_path / "trace")
    experts, weights = (
        trace.experts(),
        trace.table("routes", ["weight"])["weight"].combine_chunks().flatten().to_numpy(),
    )
    weights = weights.reshape(experts.shape)
    for layer, routing in enumerate(output.routing):
        token_N = torch.arange(B * S)[:, None].expand_as(routing.expert) if routing.token_N is None else routing.token_N
        wanted = sorted(zip(token_N.flatten().tolist(), routing.expert.flatten().tolist(), strict=True))
        rows = [(t, e) for t in range(B * S) for e in experts[t, layer].tolist() if e >= 0]
        assert sorted(rows) == [row for row in wanted if row[1] >= 0]
        taken = experts[:, layer] >= 0
        total = routing.weight[routing.expert >= 0].sum().item()
        assert weights[:, layer][taken].astype(float).sum() == pytest.approx(total, rel=2e-3, abs=1e-3)
        assert trace.counts[layer].sum(0).tolist() == routing.count_E.tolist()
    loss = next_token_loss(output.logits_BSV, torch.from_numpy(text[1]), reduction="none")
    assert trace.table("tokens")["loss"].to_numpy() == pytest.approx(loss.flatten().numpy(), abs=1e-5)


def test_margin_and_entropy_are_those_of_the_probabilities(tmp_path):
    model, text = _model(), _text()
    probabilities = []
    for router in model.routers():
        router.register_forward_hook(lambda module, arguments, out: probabilities.append(out.prob_TE().detach()))
    with torch.no_grad():
        model(torch.from_numpy(text[0]))
    _write(tmp_path / "trace", model, [text])
    routes = pandas.read_parquet(tmp_path / "trace" / "routes.parquet")
    for layer, prob_TE in enumerate(probabilities[:2]):
        rows, ranked = routes[routes.layer == layer], prob_TE.sort(descending=True).values.numpy()
        assert rows.margin.astype(float).to_numpy() == pytest.approx(ranked[:, K - 1] - ranked[:, K], abs=1e-3)
        entropy = -(prob_TE * prob_TE.log()).sum(-1).numpy()
        assert rows.entropy.astype(float).to_numpy() == pytest.approx(entropy, abs=2e-3)


def test_pandas_and_pyarrow_read_tokens_in_the_order_of_the_text(tmp_path):
    texts = [_text(0), _text(1)]
    _write(tmp_path / "trace", _model(), texts)
    tokens = pandas.read_parquet(tmp_path / "trace" / "tokens.parquet")
    assert tokens.token.tolist() == np.concatenate([text[0].ravel() for text in texts]).tolist()
    assert tokens.next.tolist() == np.concatenate([text[1].ravel() for text in texts]).tolist()
    assert tokens.window.tolist() == np.repeat(np.arange(2 * B), S).tolist()
    assert [["one", "two"].index(domain) for domain in tokens.domain] == np.concatenate(
        [text[2].ravel() for text in texts]
    ).tolist()
    routes = pq.read_table(tmp_path / "trace" / "routes.parquet")
    assert routes["token_row"].to_pylist() == np.repeat(np.arange(2 * B * S), 2).tolist()
    counts = pandas.read_parquet(tmp_path / "trace" / "counts.parquet")
    assert counts.rows.sum() == 2 * B * S * 2 * K


def test_polars_and_duckdb_read_what_pyarrow_reads(tmp_path):
    """Rows in their order, lists and half floats too, and the sums that a query makes."""
    _write(tmp_path / "trace", _model(), [_text(0), _text(1)])
    for name in ("tokens", "routes", "counts"):
        path = tmp_path / "trace" / f"{name}.parquet"
        expected = pq.read_table(path).to_pylist()
        assert polars.read_parquet(path).to_dicts() == expected, name
        rows = duckdb.sql(f"from '{path}'")
        assert [dict(zip(rows.columns, row, strict=True)) for row in rows.fetchall()] == expected, name
    counts, routes = (tmp_path / "trace" / f"{name}.parquet" for name in ("counts", "routes"))
    by_expert = f"select layer, unnest(expert) as e from '{routes}'"
    counted = f"select layer, expert, sum(rows) as n from '{counts}' group by all having n > 0 order by all"
    recounted = f"select layer, e, count(*) from ({by_expert}) where e >= 0 group by all order by all"
    assert duckdb.sql(counted).fetchall() == duckdb.sql(recounted).fetchall()
    exploded = polars.read_parquet(routes).select("layer", "expert").explode("expert").filter(polars.col("expert") >= 0)
    rows = exploded.group_by("layer", "expert").len().sort("layer", "expert").rows()
    assert rows == duckdb.sql(counted).fetchall()


def test_a_trace_says_what_was_traced_in_each_of_its_files(tmp_path):
    _write(tmp_path / "trace", _model(), [_text()])
    for name in ("tokens", "routes", "counts"):
        metadata = pq.read_schema(tmp_path / "trace" / f"{name}.parquet").metadata
        assert json.loads(metadata[KEY])["tokenizer"] == "f" * 8
    assert Trace(tmp_path / "trace").about == _about()


def test_a_trace_that_is_cut_short_by_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Writer(tmp_path / "trace", _about()):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_long_trace_takes_no_more_memory_than_a_short_one(tmp_path):
    """Python's and NumPy's own; Arrow writes each batch out as it comes."""

    def peak(n):
        text = _text()
        columns = np.zeros((B * S, 2, K), np.int64), np.ones((B * S, 2, K), np.float32)
        rest = np.zeros((B, S), np.float32), *columns, *(np.zeros((B * S, 2), np.float32) for _ in range(2))
        tracemalloc.start()
        allocated = pa.total_allocated_bytes()
        with Writer(tmp_path / f"trace{n}", _about()) as writer:
            for _ in range(n):
                writer.add(Batch(*text, *rest))
            grown = pa.total_allocated_bytes() - allocated
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most + grown

    n = ROW_GROUP // (2 * B * S)  # batches whose rows are written together
    peak(2)
    assert peak(6 * n) < 1.2 * peak(2 * n)


def _damage(path, table=None, metadata=None):
    table = pq.read_table(path) if table is None else table
    pq.write_table(table.replace_schema_metadata(metadata or table.schema.metadata), path)


def test_what_is_no_trace_is_refused_by_its_file(tmp_path):
    _write(tmp_path / "trace", _model(), [_text()])
    routes, tokens = tmp_path / "trace" / "routes.parquet", tmp_path / "trace" / "tokens.parquet"
    with pytest.raises(BadInput, match=r"is no trace: it has no tokens\.parquet"):
        Trace(tmp_path)
    good, whole = routes.read_bytes(), pq.read_table(routes)
    # A file of fewer rows, of somebody else's, of experts that there are not, of a later version, and no Parquet.
    _damage(routes, whole.slice(0, 10))
    with pytest.raises(BadInput, match="has 10 rows, and 48 tokens in 2 layers make 96"):
        Trace(tmp_path / "trace")
    _damage(routes, whole, {b"other": b"1"})
    with pytest.raises(BadInput, match="says nothing of what was traced"):
        Trace(tmp_path / "trace")
    experts = whole["expert"].combine_chunks().flatten().to_numpy().copy()
    experts[7] = 99
    columns = pa.FixedSizeListArray.from_arrays(pa.array(experts, pa.int16()), K)
    _damage(routes, whole.set_column(2, whole.schema.field("expert"), columns))
    with pytest.raises(BadInput, match="names expert 99 in layer 1, which has 6"):
        Trace(tmp_path / "trace").experts()
    about = json.loads(whole.schema.metadata[KEY])
    _damage(routes, whole, {KEY: json.dumps(about | {"schema": 99}).encode()})
    with pytest.raises(BadInput, match="newer version"):
        Trace(tmp_path / "trace")
    _damage(routes, whole, {KEY: json.dumps(about | {"tokenizer": "other"}).encode()})
    with pytest.raises(BadInput, match="is of another trace"):
        Trace(tmp_path / "trace")
    routes.write_bytes(good)
    tokens.write_bytes(b"no parquet")
    with pytest.raises(BadInput, match=r"tokens\.parquet is damaged"):
        Trace(tmp_path / "trace")


def test_a_folder_that_exists_is_not_written_over(tmp_path):
    with pytest.raises(BadInput, match="exists"):
        Writer(tmp_path, _about())
