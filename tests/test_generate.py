"""Claims about moe/eval/generate.py and experiments/generate.py."""

import math
import os
import shutil
import sys
from collections import Counter
from types import SimpleNamespace

import hydra
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

from experiments import cli
from experiments.generate import GenerateConfig, main, repr_token, say, show_next
from experiments.tables import markdown
from moe.config.data import TokenizerConfig
from moe.config.model import ModelConfig, MoEConfig
from moe.config.parse import to_dict
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.data.tokenizer import train
from moe.errors import BadInput
from moe.eval.generate import LayerChoice, generate, next_token_distribution, next_tokens, stream_text
from moe.model.attention import KVCache
from moe.model.layer import LayerRouting
from moe.model.transformer import Output, Transformer, model_tensors
from moe.run import checkpoint
from moe.run.load import load_run
from moe.train import state as state_module

BYTES = train(TokenizerConfig("byte"), [])
CONTEXT = 12
PROMPT = list(b"To be")
NEVER = -1  # an end-of-text id that no model says


def tiny(moe=True, position="rope", **changes):
    routed = MoEConfig(n_experts=4, k=2, d_expert=8, every=2) if moe else None
    changes = {"n_layers": 4, "context": CONTEXT, "init_std": 0.5} | changes
    return ModelConfig(
        vocab_size=257, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, position=position, moe=routed, **changes
    )


def build_model(*arguments, dtype=torch.float64, **keywords):
    return Transformer(tiny(*arguments, **keywords), RouterConfig()).initialize(0).to(dtype)


class Constant:
    """A model that always says the same logits, and routes as told."""

    def __init__(self, logits, routing=()):
        self.logits_V, self.routing = torch.tensor(logits), list(routing)
        self.cfg = tiny(n_layers=2)
        self.embed = SimpleNamespace(weight=torch.zeros(1))

    def __call__(self, tokens_BS, *, backend, cache=None):
        return Output(self.logits_V.expand(*tokens_BS.shape, -1), self.routing)


# --- cache and context ---


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("moe", [False, True])
def test_cached_logits_equal_uncached_ones_however_the_tokens_are_split(moe, position):
    model = build_model(moe, position)
    tokens_BS = torch.randint(257, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    whole = model(tokens_BS).logits_BSV
    for pieces in ([CONTEXT], [1] * CONTEXT, [5, 1, 4, 2]):
        cache = KVCache(model.cfg, 2, torch.float64, torch.device("cpu"))
        parts = [model(part, cache=cache).logits_BSV for part in tokens_BS.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)


def by_hand(model, ids, max_new):
    """Greedy text, the window cut by the documented rule, every position computed again."""
    window, said = ids[-CONTEXT:], []
    for _ in range(max_new):
        if len(window) == CONTEXT + 1:
            window = window[CONTEXT + 1 - CONTEXT // 2 :]
        said.append(int(model(torch.tensor([window])).logits_BSV[0, -1].argmax()))
        window = [*window, said[-1]]
    return said


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("length", [1, CONTEXT, 3 * CONTEXT])
def test_cached_and_uncached_generations_agree_beyond_the_context_too(moe, position, length):
    model = build_model(moe, position)
    ids = torch.randint(257, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_new": 3 * CONTEXT, "eot": NEVER, "seed": 5}
    sampled = [list(generate(model, ids, use_cache=cached, **settings)) for cached in (True, False)]
    assert sampled[0] == sampled[1]
    assert len(sampled[0]) == 3 * CONTEXT
    greedy = list(generate(model, ids, temperature=0, **settings))
    assert greedy == by_hand(model, ids, 3 * CONTEXT)


def test_a_context_of_one_token_works():
    assert len(list(generate(build_model(context=1), PROMPT, 4, eot=NEVER))) == 4


def test_an_empty_prompt_starts_from_the_end_of_text_token():
    model = build_model()
    assert list(generate(model, [], 5, eot=256, seed=1)) == list(generate(model, [256], 5, eot=256, seed=1))


def test_generation_ends_before_the_end_of_text_token():
    model = build_model()
    said = list(generate(model, PROMPT, 30, eot=NEVER, seed=1))
    stop = said[7]
    assert list(generate(model, PROMPT, 30, eot=stop, seed=1)) == said[: said.index(stop)]


# --- sampling ---


@settings(max_examples=100)
@given(
    rows=st.lists(st.lists(st.integers(1, 60), min_size=7, max_size=7), min_size=1, max_size=3),
    power=st.integers(1, 3),
    top_k=st.integers(0, 9),
    top_p=st.one_of(st.just(1.0), st.floats(0.001, 1)),
)
def test_the_distribution_equals_a_brute_force_one(rows, power, top_k, top_p):
    expected = []
    for row in rows:
        mass = [weight**power for weight in row]  # softmax(log(w) · power), unnormalised, in whole numbers
        order = sorted(range(len(row)), key=lambda i: (-mass[i], i))[: top_k or None]
        total = sum(mass[i] for i in order)
        sums = [sum(mass[i] for i in order[:size]) / total for size in range(1, len(order) + 1)]
        assume(all(abs(each - top_p) > 1e-9 for each in sums) or top_p == 1)
        kept = order if top_p == 1 else order[: next(size for size, each in enumerate(sums, 1) if each >= top_p)]
        kept_total = sum(mass[i] for i in kept)
        expected.append([mass[i] / kept_total if i in kept else 0.0 for i in range(len(row))])
    prob_BV = next_token_distribution(torch.tensor(rows).double().log(), 1 / power, top_k, top_p)
    torch.testing.assert_close(prob_BV, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0, 1e-320, 1e-3])
def test_no_temperature_and_hardly_any_is_the_largest_logit(temperature):
    prob_BV = next_token_distribution(torch.tensor([[1.0, 900.0, -900.0], [3.0, 1.0, 2.0]]), temperature, 0, 1.0)
    assert prob_BV.tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    with pytest.raises(BadInput, match="NaN or infinity"):
        next_token_distribution(torch.tensor([[0.0, bad]]), temperature, 0, 1.0)


def test_sampled_frequencies_are_the_probabilities():
    probabilities, n = [0.5, 0.3, 0.15, 0.05], 2000
    model = Constant([math.log(p) for p in probabilities])
    count = Counter(generate(model, [0], n, eot=NEVER, use_cache=False, seed=0))
    chi_square = sum((count[i] - n * p) ** 2 / (n * p) for i, p in enumerate(probabilities))
    assert chi_square < 25  # three degrees of freedom: above it once in 60,000
    nucleus = Counter(generate(model, [0], n, eot=NEVER, use_cache=False, top_p=0.7))
    assert set(nucleus) == {0, 1}
    assert abs(nucleus[0] / n - 0.5 / 0.8) < 0.05


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    model = build_model()
    first, again, other = (list(generate(model, PROMPT, 20, eot=NEVER, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_global_random_state_is_neither_read_nor_changed():
    model = build_model()
    said = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        said.append(list(generate(model, PROMPT, 5, eot=NEVER)))
        assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == said[1]


def test_generating_records_no_gradient_and_leaves_the_callers_mode_alone():
    model, recording = build_model(), []
    model.register_forward_hook(lambda *_: recording.append(torch.is_grad_enabled()))
    tokens = generate(model, PROMPT, 3, eot=NEVER)
    next(tokens)
    assert recording == [False]
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


# --- text ---


@given(text=st.text(st.characters(exclude_categories=["Cs"])), cut=st.integers(0, 40))
def test_characters_are_streamed_whole_and_an_unfinished_one_is_held_back(text, cut):
    ids = list(text.encode())[: -cut or None]
    pieces = list(stream_text(BYTES, iter(ids)))
    complete = bytes(ids).decode(errors="ignore")
    assert "".join(pieces) == complete
    assert "".join(pieces) == text[: len(complete)]


def test_a_character_is_streamed_as_soon_as_it_is_complete():
    taken = []
    ids = (taken.append(each) or each for each in "漢字".encode())
    assert next(stream_text(BYTES, ids)) == "漢"
    assert len(taken) == 3


def test_bytes_that_are_no_text_become_replacement_characters():
    assert "".join(stream_text(BYTES, [0xFF, 0x41])) == "\ufffdA"


def test_a_token_that_only_the_model_has_is_no_text():
    assert "".join(stream_text(BYTES, [0x41, BYTES.vocab_size, 0x42])) == "AB"
    assert repr_token(BYTES, BYTES.vocab_size) == "''"


# --- next tokens and experts ---


def test_next_tokens_are_the_softmax_in_order():
    model = build_model()
    prob_V = model(torch.tensor([PROMPT])).logits_BSV[0, -1].softmax(-1).tolist()
    tokens, _ = next_tokens(model, PROMPT, 9)
    assert [each for each, _ in tokens] == sorted(range(257), key=lambda i: -prob_V[i])[:9]
    assert [p for _, p in tokens] == pytest.approx([prob_V[each] for each, _ in tokens])
    assert len(next_tokens(model, PROMPT * 9, 1000)[0]) == 257  # longer than the context; more than there are


def test_reported_experts_are_those_the_last_token_was_routed_to():
    model = build_model()
    seen = {}
    for block in model.blocks:
        if hasattr(block.mlp, "router"):
            hook = lambda router, inputs, _, layer=block.layer: seen.update({layer: (router, inputs[0][-1])})
            block.mlp.router.register_forward_hook(hook)
    _, choices = next_tokens(model, PROMPT, 1)
    assert [each.layer for each in choices] == [1, 3] == sorted(seen)
    for layer, experts in choices:
        router, x_D = seen[layer]
        score_E = (router.w_ED.detach() @ x_D).softmax(-1).tolist()
        best = sorted(range(4), key=lambda e: -score_E[e])[:2]
        assert [e for e, _ in experts] == best
        assert [w for _, w in experts] == pytest.approx([score_E[e] / sum(score_E[b] for b in best) for e in best])


def test_a_dense_model_reports_no_experts():
    assert next_tokens(build_model(moe=False), PROMPT, 1)[1] == []


def test_experts_of_ragged_and_dropped_rows_are_the_last_tokens_own():
    rest = dict.fromkeys(("losses", "count_E", "wanted_E", "dropped", "skipped", "observed", "state_TD"))
    ragged = LayerRouting(
        expert=torch.tensor([0, 3, 2, -1]),
        weight=torch.tensor([1.0, 0.25, 0.75, 0.5]),
        token_N=torch.tensor([0, 1, 1, 1]),
        **rest,
    )
    _, choices = next_tokens(Constant([0.0] * 3, [ragged]), [0, 0], 1)
    assert choices == [LayerChoice(1, [(2, 0.75), (3, 0.25)])]


# --- a run's folder ---


@pytest.fixture(scope="module")
def made_run(tmp_path_factory):
    """A run with checkpoints at steps 5 (the best), 9 and 12, as training leaves it."""
    run = tmp_path_factory.mktemp("runs") / "first"
    run.mkdir()
    cfg = Config(run=str(run), model=tiny(), router=RouterConfig(), tokenizer=TokenizerConfig("byte"))
    (run / "config.yaml").write_text(yaml.safe_dump(to_dict(cfg)))
    (run / "tokenizer").mkdir()
    BYTES.save(run / "tokenizer")
    for step, score in ((5, 1.0), (9, 2.0), (12, 3.0)):
        model = Transformer(cfg.model, cfg.router).initialize(step)
        meta = {"tokenizer": BYTES.fingerprint}
        state = checkpoint.Snapshot(
            step=step, model=model_tensors(model), optimizer={}, meta=meta, rng=state_module.rng_state()[0]
        )
        checkpoint.save(run / "checkpoints", state, keep=3, score=score)
    return run


@pytest.fixture
def run(made_run, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made_run, tmp_path / "mine")


@pytest.mark.parametrize(("which", "step"), [("best", 5), ("last", 12), ("step-9", 9), ("step-00000009", 9)])
def test_a_run_loads_with_the_weights_of_the_checkpoint_asked_for(made_run, which, step):
    model, tokenizer, cfg = load_run(made_run, which)
    saved = load_file(made_run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], each) for name, each in saved.items())
    assert model.head.weight is model.embed.weight
    assert tokenizer.fingerprint == BYTES.fingerprint
    assert cfg.model == tiny()


@pytest.mark.parametrize("which", ["step-7", "newest", "step-", "../step-9"])
def test_a_checkpoint_that_is_not_there_is_refused_with_those_that_are(made_run, which):
    with pytest.raises(BadInput, match=rf"which={which} is not one of best, last, step-00000005, step-0"):
        load_run(made_run, which)


def test_another_tokenizer_is_refused_naming_both(run):
    other = train(TokenizerConfig("char"), ["é"])
    other.save(run / "tokenizer")
    with pytest.raises(BadInput) as refused:
        load_run(run)
    assert other.fingerprint in str(refused.value)
    assert BYTES.fingerprint in str(refused.value)


def test_a_missing_run_is_refused_with_the_runs_beside_it(made_run):
    with pytest.raises(BadInput, match=r"frist is not a run's folder.*; there are .*runs.*/first\."):
        load_run(made_run.parent / "frist")


def test_a_folder_of_runs_is_refused_with_the_runs_inside_it(made_run):
    with pytest.raises(BadInput, match=r"it has no config.yaml; there are .*/first\."):
        load_run(made_run.parent)


def test_a_missing_run_with_none_beside_it_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"none/x is not a run's folder: it has no config.yaml\."):
        load_run(tmp_path / "none" / "x")


def test_a_run_without_a_checkpoint_is_refused(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(BadInput, match="has no checkpoint"):
        load_run(run)


def test_weights_that_do_not_fit_the_config_are_refused(run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    for key, value, named in (("d_ff", 24, "down.weight"), ("n_layers", 3, "blocks.3"), ("qk_norm", "head", "q_norm")):
        changed = tree | {"model": tree["model"] | {key: value}}
        (run / "config.yaml").write_text(yaml.safe_dump(changed))
        with pytest.raises(BadInput, match=rf"does not fit .*config.yaml: .*{named}"):
            load_run(run)


@pytest.mark.parametrize("content", [b"model: [", b"\xff\xfe", b"just text"])
def test_a_damaged_config_is_refused(run, content):
    (run / "config.yaml").write_bytes(content)
    with pytest.raises(BadInput):
        load_run(run)


# --- the command ---

NASTY = [
    "To be, or not: that (is) [the] {question}",
    "it's \"quoted\" 'twice'",
    "",
    "  ",
    "3",
    "null",
    "???",
    "${oc.env:HOME} \\${x} \\\\${y}\\",
    "${",
    "ends in \\'",
    "a\nb\t#c",
    "key=value ~ * @ % naïve 漢字 😀",
]


@pytest.mark.parametrize("prompt", NASTY)
def test_a_nasty_prompt_survives_the_command_line(prompt):
    ConfigStore.instance().store(name="schema_generate", node=GenerateConfig)
    with hydra.initialize_config_dir(str(cli.CONF), version_base=None):
        tree = hydra.compose("generate", overrides=["run=r", cli.literal(f"prompt={prompt}", ("prompt",))])
    assert cli.typed(tree, GenerateConfig).prompt == prompt


@settings(max_examples=100)
@given(st.text(st.one_of(st.sampled_from("\\'\"${}:,=[]()\n "), st.characters(exclude_categories=["Cs"])), max_size=12))
def test_any_prompt_survives_the_override_grammar(prompt):
    override = OverridesParser.create().parse_override(cli.literal(f"prompt={prompt}", ("prompt",)))
    assert not override.is_sweep_override()
    assert OmegaConf.to_container(OmegaConf.create({"prompt": override.value()}), resolve=True) == {"prompt": prompt}


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    main()


def test_the_command_prints_the_prompt_and_what_the_model_says(monkeypatch, capsys, made_run):
    prompt = "To be, or 'not' ${x}: 漢"
    command(monkeypatch, f"run={made_run}", f"prompt={prompt}", "max_new=20", "seed=3", "temperature=1.5", "which=last")
    model, tokenizer, _ = load_run(made_run, "last")
    ids = generate(
        model, tokenizer.encode(prompt), 20, temperature=1.5, top_k=50, top_p=0.95, seed=3, eot=tokenizer.eot
    )
    assert capsys.readouterr().out == prompt + "".join(stream_text(tokenizer, ids)) + "\n"


@pytest.mark.parametrize("prompt", ["To be", ""])
def test_show_next_prints_tokens_and_the_experts_of_every_moe_layer(monkeypatch, capsys, made_run, prompt):
    command(monkeypatch, f"run={made_run}", f"prompt={prompt}", "show=next", "n=3")
    model, tokenizer, _ = load_run(made_run)
    tokens, choices = next_tokens(model, list(prompt.encode()) or [tokenizer.eot], 3)
    rows = [(repr_token(tokenizer, each), str(each), f"{prob:.4f}") for each, prob in tokens]
    chosen = [(str(layer), ", ".join(f"{e} ({w:.3f})" for e, w in experts)) for layer, experts in choices]
    expected = markdown(("next token", "id", "probability"), rows) + "\n"
    assert capsys.readouterr().out == expected + markdown(("layer", "experts (weight)"), chosen)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prompt=x"], "run=... is needed"),
        (["run=/nowhere/x"], "run=/nowhere/x is not a run"),
        (["run=r", "temperature=-1"], "temperature=-1.0 is out of range"),
        (["run=r", "temperature=nan"], "temperature=nan is out of range"),
        (["run=r", "top_k=-1"], "top_k=-1 is out of range"),
        (["run=r", "top_p=0"], "top_p=0.0 is out of range"),
        (["run=r", "top_p=1.1"], "top_p=1.1 is out of range"),
        (["run=r", "max_new=0"], "max_new=0 is out of range"),
        (["run=r", "n=0"], "n=0 is out of range"),
        (["run=r", "seed=-1"], "seed=-1 is out of range"),
        (["run=r", "show=table"], "show=table is not one of text, next"),
        (["run=r", "temprature=1"], "did you mean temperature"),
        (["run=r", "prompt=\udcff"], "is not valid UTF-8"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(monkeypatch, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2
    assert said.out == ""
    assert sentence in said.err
    assert said.err.count("\n") == 1


def test_an_interrupt_ends_the_text_with_a_line_break(capsys):
    def pieces():
        yield "said"
        raise KeyboardInterrupt

    say("I ", pieces())
    assert capsys.readouterr().out == "I said\n"


def test_a_reader_that_goes_away_ends_the_text(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        say("I ", iter(["said"]))
        print("nothing is raised later", flush=True)


def test_a_terminal_is_shown_pictures_of_control_characters_and_a_file_gets_the_characters(monkeypatch, capsys):
    say("\x1b[2J", iter(["a\x0e\n\x9b"]))
    assert capsys.readouterr().out == "\x1b[2Ja\x0e\n\x9b\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    say("\x1b[2J", iter(["a\x0e\n\x9b"]))
    assert capsys.readouterr().out == "␛[2Ja␎\n\ufffd\n"


def test_tokens_on_a_terminal_show_white_space_and_are_no_markup(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    show_next(BYTES, [(10, 0.5), (0xE6, 0.25), (ord("["), 0.1)], [LayerChoice(1, [(3, 0.75), (0, 0.25)])])
    shown = capsys.readouterr().out
    assert r"'\n'" in shown
    assert r"b'\xe6'" in shown
    assert "'['" in shown
    assert "3 (0.750), 0 (0.250)" in shown
