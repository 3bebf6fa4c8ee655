"""Keys and values of the prompt, computed once: the same to the bit, whatever changes between two steps."""

import torch

import alchemy
from alchemy import attention, lora, pipeline, sampling
from alchemy.extras import optimizations
from alchemy.extras.optimizations import cached_steps
from helpers.checkpoints import vocabulary_read_once  # noqa: F401
from helpers.running import tiny  # noqa: F401
from test_optimizations import adapted, inputs, pair  # noqa: F401


def counted(net):
    """A list that each call of the attention layers' `to_k` on a context adds to."""
    calls = []
    for name, layer in attention.attentions(net).items():
        if name.endswith("attn2"):
            layer.to_k.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_keys_and_values_are_computed_once_for_a_prompt_and_change_no_bit(network, inputs):
    net, given = network("unet_a", torch.float32), inputs()
    adapted(net)
    other = [*given[:2], given[2] + 1, *given[3:]]
    with torch.no_grad():
        expected, of_other = net(*given), net(*other)
        calls = counted(net)
        with optimizations.cache_prompt_kv(net):
            for _ in range(3):
                assert torch.equal(net(*given), expected)
            assert len(calls) == len(set(calls)) == 15
            assert (
                torch.equal(net(*other), of_other)
                and torch.equal(net(*given), expected)
                and len(calls) == 45
            )
        assert torch.equal(net(*given), expected) and len(calls) == 60
    assert not any("project_kv" in vars(layer) for layer in attention.attentions(net).values())


def test_another_scale_another_adapter_and_another_value_are_another_answer(network, inputs):
    net, given = network("unet_a", torch.float32), inputs()
    parameters = adapted(net)

    def changed():
        yield
        parameters[11].mul_(2)  # of attn2.to_k
        yield
        with lora.lora_scale(net, 0):
            yield
        with lora.lora_scale(net, 0.5):
            yield
        for layer in lora.attention_layers(net).values():
            lora.add_adapter(layer, "more", *pair(layer), 2)
        yield
        given[2].add_(1)
        yield
        lora.merge(net)
        yield

    with torch.no_grad():
        kept = given[2].clone()
        with optimizations.cache_prompt_kv(net):
            ours = [net(*given).clone() for _ in changed()]
    assert len({float(x.sum()) for x in ours[:6]}) == 6 and len(ours) == 7

    net, given[2] = network("unet_a", torch.float32), kept
    parameters = adapted(net)
    with torch.no_grad():
        theirs = [net(*given) for _ in changed()]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_where_gradients_are_wanted_nothing_is_kept(network, inputs):
    net, given = network("unet_a", torch.float32), inputs()
    parameters = adapted(net)
    net(*given).square().mean().backward()
    expected = [p.grad.clone() for p in parameters]
    with optimizations.cache_prompt_kv(net):
        with torch.no_grad():
            net(*given)
        for p in parameters:
            p.grad = None
        net(*given).square().mean().backward()
    assert (
        all(torch.equal(p.grad, g) for p, g in zip(parameters, expected))
        and sum(g.any() for g in expected) > 200
    )


def test_attention_that_is_watched_sees_the_same(network, inputs):
    net, given, names = (
        network("unet_a", torch.float32),
        inputs(),
        ["mid_block.attentions.0.transformer_blocks.2.attn2"],
    )
    seen = []
    with torch.no_grad(), attention.record_attention(net, names, lambda name, p: seen.append(p)):
        net(*given)
        with optimizations.cache_prompt_kv(net):
            net(*given), net(*given)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_picture_goes_through_the_prompt_but_once(tiny):
    sdxl = alchemy.load(tiny, "cpu", "float32")
    size, unconditional, options = pipeline.resolve_options(sdxl, None, None, {"steps": 4})
    told = sdxl.encode_prompt(["a dog"], size)
    expected = pipeline.sample(sdxl, told, unconditional, 3, size, **options)
    calls = counted(sdxl.unet)
    ours = pipeline.sample(
        sdxl,
        told,
        unconditional,
        3,
        size,
        progress=lambda steps: cached_steps(sdxl.unet, steps),
        **options,
    )
    assert ours.tobytes() == expected.tobytes() and len(calls) == len(set(calls)) > 0
