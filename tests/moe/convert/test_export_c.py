"""Claims about model.bin and run.c: the program compiles without a warning and says what the model says, whatever its
shape; a file that is not one that was written is refused and never a crash."""

import dataclasses
import os
import random
import re
import struct
import subprocess
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from moe.config.balance import BalanceConfig
from moe.config.data import TokenizerConfig
from moe.config.model import LatentConfig, MoEConfig, RopeScaling, moe_layers
from moe.config.router import RouterConfig
from moe.config.run import Config
from moe.convert import export_c
from moe.convert.quantize import Rounding, rounded
from moe.data.chat import DEFAULT
from moe.data.tokenizer import ONE_CHARACTER, Tokenizer, train
from moe.errors import BadInput
from moe.eval.generate import generate, next_token_distribution
from moe.model.transformer import next_token_loss
from tests.c_program import NEEDS_COMPILER, STRICT, experts_shown, ids_of, random_model, sizes
from tests.small_models import BYTES

PROMPT = list(b"To be, or not")
NEW = 256

pytestmark = NEEDS_COMPILER


GROUPED = RouterConfig("sigmoid", selection_bias=True, groups=4, k_groups=2, scale=2.5)
SHARED = MoEConfig(n_experts=8, k=3, d_expert=32, n_shared=2, first_dense=1)
SHAPES = {
    "cpu-nano": (sizes(MoEConfig(8, 2, 64), n_heads=2, qk_norm="head"), RouterConfig()),
    "gpt2": (sizes(norm="layer", position="learned", bias=True, activation="gelu_tanh"), RouterConfig()),
    "llama": (sizes(n_kv_heads=2, tie_embeddings=False, rope_theta=5e5), RouterConfig()),
    "yarn": (sizes(rope_theta=50.0, rope_scaling=RopeScaling("yarn", 4.0, 24)), RouterConfig()),
    "mixtral": (sizes(MoEConfig(8, 2, 96), n_kv_heads=2, tie_embeddings=False), RouterConfig()),
    "olmoe": (sizes(MoEConfig(16, 4, 32), qk_norm="full", tie_embeddings=False), RouterConfig(renormalize=False)),
    "qwen3-moe": (sizes(MoEConfig(16, 4, 32, every=2), n_kv_heads=2, head_dim=32, qk_norm="head"), RouterConfig()),
    "deepseek-v3": (sizes(SHARED, n_layers=3), GROUPED),
    "last layers dense": (sizes(MoEConfig(8, 2, 32, first_dense=1, last_dense=1), n_layers=3), RouterConfig()),
    "shared gate": (sizes(dataclasses.replace(SHARED, shared_gate=True), activation="relu2"), GROUPED),
    "softmax with groups": (sizes(MoEConfig(8, 2, 32)), RouterConfig(groups=2, k_groups=1, group_top=1)),
    "own E and K by layer": (
        sizes(MoEConfig(8, 2, 32, n_experts_by_layer=[4, 6], k_by_layer=[1, 3]), activation="gelu", norm="layer"),
        RouterConfig("sigmoid", renormalize=False, scale=1.5),
    ),
    "biases and a shared expert": (sizes(MoEConfig(4, 2, 32, n_shared=1), bias=True, norm="layer"), RouterConfig()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_logits_and_experts_are_the_models(shape, say, tmp_path):
    model = random_model(*SHAPES[shape])
    done = say(
        model, "-i", " ".join(map(str, PROMPT)), "-n", str(NEW), "-t", "0", "--ids", "--experts",
        "--logits", tmp_path / "logits",
    )  # fmt: skip
    new = list(generate(model, PROMPT, NEW, temperature=0, eot=256))
    assert ids_of(done) == new
    assert (len(new), len(set(new)) > 20) == (NEW, True), "a model that stops or repeats itself shows little"
    # Within the first window every logit and every expert is compared with one pass over it.
    window = [*PROMPT, *new][: model.cfg.context]
    with torch.no_grad():
        logits_BSV, routing = model(torch.tensor([window]), backend="reference")
    logits = np.fromfile(tmp_path / "logits", np.float32).reshape(-1, 257)[: len(window) - len(PROMPT) + 1]
    assert np.abs(logits - logits_BSV[0, len(PROMPT) - 1 :].numpy()).max() < 1e-4
    shown = experts_shown(done)
    for layer, report in zip(moe_layers(model.cfg), routing, strict=True):
        for position, (expert_K, weight_K) in enumerate(zip(report.expert, report.weight, strict=True)):
            token, chosen = shown[layer][position]
            assert (token, list(chosen)) == (window[position], expert_K.tolist())
            assert list(chosen.values()) == pytest.approx(weight_K.tolist(), abs=1e-4)
    assert sorted(shown) == moe_layers(model.cfg)


def test_separate_documents_stay_separate(say):
    cfg = sizes(MoEConfig(4, 2, 32), n_layers=2)
    prompt = [*b"one", 256, *b"two", 256, *b"three"]
    for position in ("rope", "learned"):
        model = random_model(dataclasses.replace(cfg, position=position), RouterConfig(), document_end=256)
        done = say(model, "-i", ",".join(map(str, prompt)), "-n", "60", "-t", "0", "--ids")
        assert ids_of(done) == list(generate(model, prompt, 60, temperature=0, eot=256))
        together = random_model(dataclasses.replace(cfg, position=position), RouterConfig())
        assert ids_of(done) != list(generate(together, prompt, 60, temperature=0, eot=256))


def test_a_prompt_longer_than_the_context_is_read_from_its_end_and_none_begins_a_document(say):
    model = random_model(*SHAPES["cpu-nano"])
    for prompt in ("long " * 40, ""):
        done = say(model, "-p", prompt, "-n", "40", "-t", "0", "--ids")
        assert ids_of(done) == list(generate(model, BYTES.encode(prompt), 40, temperature=0, eot=256))


@pytest.mark.parametrize("shape", ["deepseek-v3", "shared gate", "gpt2"])
def test_int8_computes_with_the_weights_that_quantize_rounds_to(shape, say, tmp_path):
    model = random_model(*SHAPES[shape])
    arguments = ("-p", "To be", "-n", "60", "-t", "0", "--ids", "--logits", tmp_path / "logits")
    say(model, *arguments, dtype="int8")
    in_int8 = np.fromfile(tmp_path / "logits", np.float32)
    int8_size = (tmp_path / "two" / "model.bin").stat().st_size
    with rounded(model, Rounding("int8")):
        say(model, *arguments)
    assert np.abs(in_int8 - np.fromfile(tmp_path / "logits", np.float32)).max() < 1e-3
    assert int8_size < 0.45 * (tmp_path / "two" / "model.bin").stat().st_size


@pytest.mark.parametrize("dtype", ["fp32", "int8"])
def test_a_score_is_what_the_model_says_of_every_token_after_the_first(dtype, say):
    model = random_model(*SHAPES["shared gate"], document_end=256)
    draw = torch.Generator().manual_seed(3)
    windows = [torch.randint(0, 257, (n,), generator=draw).tolist() for n in (97, 1, 40)]  # the context is 96
    done = say(
        model, "--score", "--ids", dtype=dtype, lines="\n".join(" ".join(map(str, ids)) for ids in windows).encode()
    )
    with torch.no_grad(), rounded(model, Rounding("int8")) if dtype == "int8" else nullcontext():
        expected = [
            next_token_loss(model(torch.tensor([ids[:-1]])).logits_BSV, torch.tensor([ids[1:]]), "none")[0].tolist()
            if len(ids) > 1
            else []
            for ids in windows
        ]
    scored = [[float(word) for word in line.split()] for line in done.stdout.decode().splitlines()]
    assert [len(line) for line in scored] == [96, 0, 39]
    for line, nats in zip(scored, expected, strict=True):
        assert line == pytest.approx(nats, abs=1e-4)


def test_a_score_of_text_is_that_of_its_ids_whatever_its_length(say):
    model = random_model(*SHAPES["cpu-nano"])
    text = "To be, or not to be. " * 8  # longer than the context
    ids = " ".join(map(str, BYTES.encode(text))).encode()
    done = [say(model, "--score", lines=text.encode()), say(model, "--score", "--ids", lines=ids + b"\n" + ids)]
    (of_text,), of_ids = (part.stdout.splitlines() for part in done)
    assert of_ids == [of_text, of_text]
    assert len(of_text.split()) == len(text) - 1


TEXTS = [
    "To be, or not to be: that's the question.",
    "I'LL we've they'Re 'sure ' 'ſ x'ſy O'D",
    "  two\n\n\n   lines \r\n\ttab \n end   ",
    "12345 x1y22 3.14 ½² ٣٤٥٦",
    "naïve 漢字かな 😀 e\u0301 \u00a0\u3000 \u2028x \x85 \x1c",
    "!?#$\n\n if (a[0]) { return -1; }\r\n",
    "",
]


MERGED = ["abbabaab babbaaab aabbbaba ", "abcbcabcab cababcbca bcabcacab "]


def tokenizers():
    another = Tokenizer("own", r"\p{L}+|\s|.", train(TokenizerConfig("byte"), []).ranks, {"<|endoftext|>": 256})
    return {
        "byte": BYTES,
        "char": train(TokenizerConfig("char"), TEXTS[:5:2]),
        "bpe": train(TokenizerConfig("bpe", vocab_size=360), [text * 3 for text in [*TEXTS, "ſyſyſy ", *MERGED]]),
        "own": another,
    }


@pytest.mark.parametrize("name", ["byte", "char", "bpe"])
def test_text_becomes_the_tokenizers_ids(name, say):
    tokenizer = tokenizers()[name]
    cfg = dataclasses.replace(SHAPES["cpu-nano"][0], vocab_size=tokenizer.vocab_size)
    model = random_model(cfg, RouterConfig())
    for text in [*TEXTS, *random_texts(8), *random_texts(4, "abc ")]:
        done = say(model, "-p", text, "-n", "1", "--experts", tokenizer=tokenizer)
        ids = tokenizer.encode(text) or [tokenizer.eot]
        assert [token for token, _ in experts_shown(done)[0]] == ids, repr(text)
        assert done.stdout[:-1] in {tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)} | {b""}


def random_texts(n, characters="aBſ é漢 19½ \t\n\r'!.slvetd\u00a0"):
    draw = random.Random(5)
    return ["".join(draw.choices(characters, k=60)) for _ in range(n)]


def test_a_tokenizer_with_another_pattern_takes_ids_and_still_prints_text(say, program, tmp_path):
    tokenizer = tokenizers()["own"]
    assert [export_c.encodes_text(known) for known in tokenizers().values()] == [True, True, True, False]
    assert BYTES.pattern == ONE_CHARACTER
    model = random_model(*SHAPES["cpu-nano"])
    done = say(model, "-i", "84 111", "-n", "5", "-t", "0", tokenizer=tokenizer)
    new = list(generate(model, [84, 111], 5, temperature=0, eot=256))
    assert done.stdout == tokenizer.decode_bytes(new) + b"\n"
    done = subprocess.run([program, tmp_path / "two" / "model.bin", "-p", "To"], capture_output=True, check=False)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
    assert b"give ids (-i)" in done.stderr
    done = say(model, "-n", "5", "-t", "0", "--ids", tokenizer=tokenizer)
    assert ids_of(done) == list(generate(model, [], 5, temperature=0, eot=256))


def test_draws_have_the_models_distribution(say):
    """Of a model whose logits are the same everywhere."""
    model = random_model(sizes(norm="layer", bias=True, tie_embeddings=False, n_layers=1), RouterConfig())
    with torch.no_grad():
        model.norm.weight.zero_()
        model.head.weight[:8] += 0.2 * model.norm.bias
        model.head.weight[256] = 0
        model.head.weight[256] -= 20 * model.norm.bias  # never ends
        logits_V = (model.head.weight @ model.norm.bias)[None]
    draw = lambda *arguments: ids_of(say(model, "-n", "3000", "--ids", *arguments))
    for arguments, setting in (((), (0.8, 0, 1.0)), (("-t", "1.5", "--top-p", "0.7"), (1.5, 0, 0.7))):
        ids = draw(*arguments)
        prob_V = next_token_distribution(logits_V, *setting)[0].numpy()
        share_V = np.bincount(ids, minlength=257) / len(ids)
        assert np.abs(share_V - prob_V).max() < 4 * np.sqrt(prob_V.max() / len(ids))
        assert not share_V[prob_V == 0].any()
        assert draw(*arguments, "--seed", "0") == ids != draw(*arguments, "--seed", "1")
    assert set(draw("--top-p", "0")) == {int(logits_V.argmax())}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": RouterConfig("relu")}, "router.name=relu has no counterpart in run.c: accepted is softmax or sigm"),
        ({"router": RouterConfig("my_router:Own")}, "router.name=my_router:Own has no counterpart"),
        ({"router": RouterConfig(logits="cosine")}, "router.logits=cosine"),
        ({"router": RouterConfig(gradient="straight-through")}, "router.gradient=straight-through"),
        ({"router": RouterConfig(input="previous")}, "router.input=previous"),
        ({"router": RouterConfig(shared=True)}, "router.shared=True"),
        ({"router": RouterConfig(norm_min=0.1)}, "router.norm_min=0.1"),
        ({"balance": BalanceConfig(force="balanced")}, "balance.force=balanced"),
        ({"moe": MoEConfig(4, 2, 8, widths=[4, 4, 8, 8])}, "model.moe.widths="),
        ({"moe": MoEConfig(4, 2, 8, n_null=1)}, "model.moe.n_null=1"),
        ({"moe": MoEConfig(4, 2, 8, n_copy=1)}, "model.moe.n_copy=1"),
        ({"moe": MoEConfig(4, 2, 8, n_constant=1)}, "model.moe.n_constant=1"),
        ({"moe": MoEConfig(4, 2, 8, depth=0.5)}, "model.moe.depth=0.5"),
    ],
)
def test_a_setting_that_the_program_does_not_have_is_refused_by_name(changes, message):
    moe = changes.pop("moe", MoEConfig(4, 2, 8))
    cfg = Config(model=sizes(moe), **changes)
    with pytest.raises(BadInput) as error:
        export_c.check(cfg)
    assert str(error.value).startswith(message)
    export_c.check(dataclasses.replace(cfg, model=sizes()))  # a dense model has no router


@pytest.mark.parametrize("moe", [None, MoEConfig(4, 2, 8)])
@pytest.mark.parametrize("change", [
        {"window": 8}, {"embed_scale": 2.0}, {"residual_scale": 2.0}, {"attn_scale": 2.0},
        {"logit_divisor": 2.0}, {"rope_fraction": 0.5}, {"norm_at": "after"},
        {"sinks": True}, {"expert_bias": True}, {"activation": "swiglu_clipped"},
    ],
)  # fmt: skip
def test_attention_that_the_program_does_not_have_is_refused_by_name_with_or_without_experts(change, moe):
    export_c.check(Config(model=sizes(moe)))
    ((name, value),) = change.items()
    with pytest.raises(BadInput, match=f"model.{name}={value} has no counterpart in run.c"):
        export_c.check(Config(model=sizes(moe, **change)))


def test_latent_attention_is_refused_in_a_dense_model_too():
    with pytest.raises(BadInput, match=r"model\.latent=.* has no counterpart in run\.c: accepted is none"):
        export_c.check(Config(model=sizes(latent=LatentConfig())))


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"vocab_size": 200}, "fp32", "the tokenizer's 257 tokens are more than the model's 200"),
        ({"d_ff": 67}, "int8", "none divides the 67 of blocks.0.mlp.down"),
        ({"nan": True}, "fp32", "NaN or infinity"),
    ],
)
def test_a_model_that_does_not_fit_leaves_nothing_behind(change, dtype, message, tmp_path):
    has_nan = change.pop("nan", False)
    model = random_model(sizes(**change), RouterConfig())
    if has_nan:
        model.norm.weight.data[0] = torch.nan
    with pytest.raises(BadInput, match=re.escape(message)):
        export_c.save(model, BYTES, tmp_path / "two", dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small model.bin of many parts."""
    cfg = sizes(MoEConfig(4, 2, 32, n_shared=1, shared_gate=True, first_dense=1), d_model=32, d_ff=32, context=16)
    folder = tmp_path_factory.mktemp("small") / "two"
    tokenizer = Tokenizer("byte", BYTES.pattern, BYTES.ranks, BYTES.specials)
    tokenizer.template = DEFAULT
    export_c.save(random_model(cfg, dataclasses.replace(GROUPED, groups=2, k_groups=1)), tokenizer, folder, "int8")
    return (folder / "model.bin").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "is truncated or altered"),
        (lambda content: content[:100], "is no model, or is truncated: it has 100 bytes"),
        (lambda content: b"", "is no model, or is truncated: it has 0 bytes"),
        (lambda content: content + b"\0", "is truncated or altered"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "is altered: its checksum is another"),
        (lambda content: b"GGUF" + content[4:], "is no model that python -m experiments.export wrote"),
        (lambda content: content[:8] + struct.pack("<I", 1) + content[12:], "is of version 1"),
        (lambda content: export_c.seal(content[:32] + struct.pack("<i", 300) + content[36:]), "is no model: it has no"),
        (lambda content: export_c.seal(content[:256]), "is no model: its table is too long"),
    ],
)
def test_a_file_that_is_not_whole_is_refused_in_a_sentence(damage, message, small, program, tmp_path):
    (tmp_path / "model.bin").write_bytes(damage(small))
    done = subprocess.run([program, tmp_path / "model.bin", "-n", "1"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {tmp_path / 'model.bin'} {message}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "-1"), "-t -1 is not a number from 0 to 1e+30"),
        (("-t", "warm"), "-t warm is not a number"),
        (("--top-p", "nan"), "--top-p nan is not a number from 0 to 1"),
        (("-n", "2.5"), "-n 2.5 is not a whole number from 0 to 1e+08"),
        (("-n",), "-n needs a value"),
        (("--top", "1"), "--top is no option"),
        (("-i", "257"), "-i takes ids from 0 to 256"),
        (("-i", "1 2x"), "-i takes ids from 0 to 256"),
        (("-p", b"\xff"), "the prompt is not UTF-8"),
        (("-p", b"\xe6\xbc"), "the prompt is not UTF-8"),
    ],
)
def test_an_argument_that_means_nothing_is_refused_in_a_sentence(arguments, message, small, program, tmp_path):
    (tmp_path / "model.bin").write_bytes(small)
    done = subprocess.run([program, tmp_path / "model.bin", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"error: {message}")


@pytest.fixture(scope="module")
def survives(program, tmp_path_factory):
    """(content) -> the exit status of the program under both sanitizers, which is an end and no crash."""
    source, folder = program.parent / "two" / "run.c", tmp_path_factory.mktemp("sanitized")
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    if subprocess.run(["cc", *flags, *STRICT, source, "-o", folder / "run", "-lm"], check=False).returncode:
        pytest.skip("this C compiler has no sanitizers: -fsanitize=address,undefined")
    environment = os.environ | {"ASAN_OPTIONS": "allocator_may_return_null=1:detect_leaks=0:exitcode=99"}

    def call(content, *mode):
        (folder / "model.bin").write_bytes(content)
        command = [folder / "run", folder / "model.bin", "-p", "It's 12", "-n", "3", "--experts", *mode]
        done = subprocess.run(command, input=b"Is it?\n\nYes", capture_output=True, env=environment, check=False)
        assert done.returncode in (0, 2), done.stderr[-2000:]
        assert b"runtime error" not in done.stderr
        assert done.returncode == 0 or re.search(rb"^error: .*\n\Z", done.stderr, re.MULTILINE)
        return done.returncode

    return call


def test_no_damage_to_a_file_makes_the_program_crash(small, survives):
    """Bytes flipped and files cut, with the checksum left wrong and made right."""
    draw = random.Random(0)
    table = struct.unpack_from("<Q", small, 24)[0] * export_c.ENTRY.size + export_c.HEADER.size
    codes = []
    for trial in range(100):
        content = bytearray(small)
        # Most flips are where the sizes are.
        for _ in range(draw.choice((1, 1, 2))):
            place = draw.randrange(draw.choice((160, 160, table, len(content))))
            content[place] = draw.choice((content[place] ^ 1 << draw.randrange(8), 0, 255, draw.randrange(256)))
        if trial % 6 == 0:
            content = content[: draw.randrange(len(content))]
        if trial % 4 and len(content) >= export_c.HEADER.size:
            content = bytearray(export_c.seal(bytes(content)))
        codes.append(survives(content, *(("--chat",), ("--score",), ())[trial % 3]))
    assert min(codes.count(0), codes.count(2)) > 5, "the flips reach both ends"


def test_no_number_in_a_header_or_table_makes_the_program_crash(small, survives):
    """Each of them as it should not be, with the checksum right."""
    entries = {}
    for place in range(export_c.HEADER.size, len(small), export_c.ENTRY.size)[: struct.unpack_from("<Q", small, 24)[0]]:
        name, _, _, _, _, offset = export_c.ENTRY.unpack_from(small, place)
        entries[name.rstrip(b"\0").decode()] = place, offset
    header = [(32 + 4 * i, value) for i in range(29) for value in (0, -1, 7, 2**31 - 1)]
    experts = [(entries["experts_and_chosen"][1] + 4 * i, value) for i in range(4) for value in (0, 3, 5, -1)]
    ends = [(entries["tokenizer.ends"][1] + 4 * i, value) for i in (4, 256) for value in (0, 2**30, -1)]
    chat = [(entries["chat"][1] + i, value) for i in (0, 60) for value in (0, -1, 0x303030FF)]
    merged = [(entries["tokenizer.sorted"][1] + 4 * i, value) for i in (0, 255) for value in (256, 2**30, -1)]
    scale = [(entries["embed.scale"][0] + export_c.ENTRY.size - 16, value) for value in (0, 3, -1)]  # its columns
    for place, value in [*header, *experts, *ends, *merged, *scale, *chat]:
        survives(export_c.seal(small[:place] + struct.pack("<i", value) + small[place + 4 :]), "--chat")
