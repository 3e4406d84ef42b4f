"""Experts stored in few bits: what a model then computes, against the same model with the weights that are stood for;
what is stored and what is not; and what is refused."""

import dataclasses
import weakref

import pytest
import torch

from kernels.quantized import FORMATS, dequantize
from moe.config.model import ModelConfig, MoEConfig
from moe.config.router import RouterConfig
from moe.errors import BadInput
from moe.model.experts import Experts
from moe.model.quantized import QuantizedExperts, check_storable, round_trip, stacks_on_meta, storage, store
from moe.model.transformer import Transformer

CFG = ModelConfig("m", 40, 16, 3, 32, 2, d_ff=24, moe=MoEConfig(5, 2, 64, every=2, n_shared=1), init_std=0.4)
ALL = dataclasses.replace(CFG.moe, every=1, n_shared=0)
MODELS = {
    "dense layers and a shared expert": (CFG, RouterConfig()),
    "as gpt-oss": (
        dataclasses.replace(CFG, moe=ALL, activation="swiglu_clipped", expert_bias=True, sinks=True, attn_bias="all"),
        RouterConfig(bias=True),
    ),
    "two widths": (dataclasses.replace(CFG, moe=dataclasses.replace(ALL, widths=[32, 64, 32, 64, 64])), RouterConfig()),
    "slots": (dataclasses.replace(CFG, moe=ALL), RouterConfig("soft")),
    "cheap experts": (dataclasses.replace(CFG, moe=dataclasses.replace(ALL, n_null=1, n_constant=1)), RouterConfig()),
    "relu": (dataclasses.replace(CFG, activation="relu2", moe=ALL), RouterConfig("relu")),
    "weights on the input": (dataclasses.replace(CFG, moe=dataclasses.replace(ALL, weigh_input=True)), RouterConfig()),
}  # fmt: skip
TOKENS_BS = torch.randint(0, 40, (2, 16), generator=torch.Generator().manual_seed(0))


def built(name="as gpt-oss"):
    """A model with random weights, biases too."""
    model = Transformer(*MODELS[name]).initialize(0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def stored(name, format):
    """The same model with its experts in a format."""
    model = built(name)
    store(model, format, dict(model.named_parameters()).__getitem__)
    return model


def standing_for(name, format):
    """The same model with the weights that its stored ones stand for, in their place."""
    model = built(name)
    with torch.no_grad():
        for module in model.modules():
            for w in (module.w_up_EFD, module.w_down_EDF) if isinstance(module, Experts) else ():
                w.copy_(dequantize(FORMATS[format](w)))
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_every_backend_computes_the_model_of_the_weights_that_are_stood_for(name, format):
    model, wide = stored(name, format), standing_for(name, format)
    assert not any(isinstance(module, Experts) for module in model.modules())
    with torch.no_grad():
        as_trained = built(name)(TOKENS_BS).logits_BSV
        for backend in ("reference", "torch"):
            want, got = (of(TOKENS_BS, backend=backend) for of in (wide, model))
            assert torch.equal(got.logits_BSV, want.logits_BSV)
            for layer, its in zip(got.routing, want.routing, strict=True):
                assert torch.equal(layer.count_E, its.count_E)
            assert not torch.equal(got.logits_BSV, as_trained)
        on_kernels = model(TOKENS_BS, backend="triton").logits_BSV
    torch.testing.assert_close(on_kernels, want.logits_BSV, rtol=1e-4, atol=1e-4)


def test_a_model_with_products_in_fp8_computes_the_same_with_its_experts_stored_in_fp8():
    cfg = dataclasses.replace(CFG, d_model=144, moe=dataclasses.replace(ALL, precision="fp8"))
    model = Transformer(cfg, RouterConfig()).initialize(0).double().eval()
    with torch.no_grad():
        for backend in ("reference", "torch", "triton"):
            want = model(TOKENS_BS, backend=backend).logits_BSV
            after = Transformer(cfg, RouterConfig()).initialize(0).double().eval()
            store(after, "fp8", dict(after.named_parameters()).__getitem__)
            got = after(TOKENS_BS, backend=backend).logits_BSV
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
            plain = Transformer(dataclasses.replace(cfg, moe=ALL), RouterConfig()).initialize(0).double().eval()
            assert (plain(TOKENS_BS, backend=backend).logits_BSV - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("format", FORMATS)
def test_under_autocast_the_activations_have_its_type(format):
    """Wide weights of the reference backend are not rounded to that type before an expert's rows are added up."""
    model, wide = stored("as gpt-oss", format), standing_for("as gpt-oss", format)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, *others = (
            of(TOKENS_BS, backend=backend).logits_BSV
            for of, backend in ((wide, "torch"), (model, "torch"), (model, "reference"), (model, "triton"))
        )
    assert {other.dtype for other in others} == {torch.bfloat16}
    assert torch.equal(others[0], want)
    for other in others[1:]:
        assert (other - want).float().norm() < 0.05 * want.float().norm()


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_but_the_matrices_of_routed_experts_is_stored_otherwise(format):
    name = "dense layers and a shared expert"
    before, after = built(name).state_dict(), stored(name, format).state_dict()
    kept = before.keys() & after.keys()
    assert {name.split("experts.")[-1] for name in before.keys() - kept} == {"w_up_EFD", "w_down_EDF"}
    assert all(name.startswith("blocks.1.mlp.experts.") for name in after.keys() - kept)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in kept)
    assert any("shared" in name for name in kept)


def test_what_experts_take_is_what_their_tensors_take():
    assert storage(built()) is None
    # 3 layers of 5 experts: an up matrix of 128 rows of 32 weights, a down matrix of 32 rows of 64.
    n_up, n_down = 15 * 128 * 32, 15 * 32 * 64
    bits = {"mxfp4": 4.25, "int8": 8 + 32 * (n_up / 32 + n_down / 64) / (n_up + n_down)}
    for format, want in bits.items():
        told = storage(stored("as gpt-oss", format))
        assert told.bits == want
        assert (told.format, told.n_bytes, told.wide_bytes) == (format, want * (n_up + n_down) / 8, 4 * (n_up + n_down))
        assert (
            str(told) == f"experts: {format}, {want:.4g} bits a weight, {told.n_bytes / 1e6:.1f} MB in place of 0.4 MB"
        )


@pytest.mark.parametrize("name", ["as gpt-oss", "two widths"])
def test_one_stack_of_wide_matrices_is_in_memory_at_a_time(name):
    whole, alive, read = dict(built(name).named_parameters()), [], []

    def read_one(weight):
        assert [other for other, there in zip(read, alive, strict=True) if there() is not None] == []
        w = whole[weight].detach().clone()
        alive.append(weakref.ref(w))
        read.append(weight)
        return w

    with stacks_on_meta():
        model = Transformer(*MODELS[name])
    matrices = {key: p for key, p in model.named_parameters() if key.endswith(("w_up_EFD", "w_down_EDF"))}
    assert {p.device.type for p in matrices.values()} == {"meta"}
    assert {p.device.type for key, p in model.named_parameters() if key not in matrices} == {"cpu"}
    store(model, "mxfp4", read_one)
    assert sorted(read) == sorted(matrices)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    same = stored(name, "mxfp4").state_dict()
    assert all(
        torch.equal(model.state_dict()[key], same[key]) for key in same if "experts" in key and "bias" not in key
    )
    assert Transformer(*MODELS[name]).blocks[0].mlp.router.w_ED.device.type == "cpu"
    assert not any(p.is_meta for p in Transformer(*MODELS[name]).parameters()), "outside of it matrices have memory"


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_where_a_gradient_is_wanted_it_is_refused_in_a_sentence(backend):
    with pytest.raises(ValueError, match=r"no backward for quantised weights; call it under torch\.no_grad\(\)"):
        stored("as gpt-oss", "int8")(TOKENS_BS, backend=backend)


def test_they_move_with_the_model():
    model = stored("two widths", "mxfp4").to("meta")
    stacks = [module for module in model.modules() if isinstance(module, QuantizedExperts)]
    assert len(stacks) == 6
    assert {tensor.device.type for stack in stacks for w in stack.weights() for tensor in w} == {"meta"}


DENSE = dataclasses.replace(CFG, moe=None)
REFUSED = {
    "no format": (CFG, "int3", f"experts=int3 is not one of {', '.join(FORMATS)}"),
    "dense": (DENSE, "int8", "experts=int8 stores routed experts in few bits, and this model is dense: it has none."),
    "products in fp8": (
        dataclasses.replace(CFG, moe=dataclasses.replace(ALL, precision="fp8")), "int8",
        "experts=int8 has no products in fp8, and model.moe.precision is fp8: accepted is experts=fp8.",
    ),
    "d_model": (
        dataclasses.replace(CFG, d_model=48), "mxfp4",
        "experts=mxfp4 cannot store model.d_model=48: mxfp4 takes rows of 32 weights or a multiple; they are 48 long.",
    ),
    "d_expert": (
        dataclasses.replace(CFG, moe=MoEConfig(5, 2, 40)), "mxfp4",
        "experts=mxfp4 cannot store model.moe.d_expert=40: mxfp4 takes rows of 32 weights or a multiple",
    ),
    "widths": (
        dataclasses.replace(CFG, moe=MoEConfig(2, 1, 64, widths=[96, 80])), "mxfp4",
        "experts=mxfp4 cannot store model.moe.widths=80: mxfp4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_stored_is_refused_by_key_and_value(case):
    cfg, format, sentence = REFUSED[case]
    with pytest.raises(BadInput) as refused:
        check_storable(cfg, format)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("format", FORMATS)
def test_every_model_here_can_be_stored(format):
    for cfg, _ in MODELS.values():
        check_storable(cfg, format)
    if format == "int8":  # of any width
        check_storable(REFUSED["widths"][0], format)


def test_a_weight_that_the_format_cannot_hold_is_named():
    model = built()
    with torch.no_grad():
        model.blocks[1].mlp.experts.w_down_EDF[3, 0, 0] = torch.inf
    with pytest.raises(BadInput) as refused:
        store(model, "mxfp4", dict(model.named_parameters()).__getitem__)
    assert str(refused.value) == (
        "experts=mxfp4 cannot store the weight blocks.1.mlp.experts.w_down_EDF: "
        "mxfp4 takes finite weights; some are not."
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_round_trip_gives_what_the_format_stands_for_and_the_second_one_the_same(format):
    w_ENM = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(0))
    once = round_trip(w_ENM, format)
    assert 0 < ((once - w_ENM).norm() / w_ENM.norm()) < 0.2
    torch.testing.assert_close(round_trip(once, format), once, rtol=1e-6, atol=0)
